"use strict";

const form = document.getElementById("point"); // of a test image
const filter = document.getElementById("filter");
const said = document.getElementById("said");

// While a run is at work, update its progress. When all runs have ended, load their results.
const progress = document.getElementById("progress");
const atWork = () => progress?.querySelector("[data-state=new], [data-state=running]");
if (atWork()) {
  const timer = setInterval(async () => {
    const answer = await fetch("/progress");
    if (!answer.ok) return;
    progress.innerHTML = await answer.text();
    if (atWork()) return;
    clearInterval(timer);
    if (progress.querySelector("[data-state=done]")) location.reload();
  }, 2000);
}

// The address follows what is chosen. It never has the token, which is in a cookie.
function keepAddress(words) {
  history.replaceState(null, "", `${location.pathname}${String(words) ? `?${words}` : ""}`);
}
document.addEventListener("change", (event) => {
  if (event.target.name === "pick") keepAddress(new URLSearchParams(new FormData(filter)));
});
document.getElementById("copy").addEventListener("click", async (event) => {
  try {
    await navigator.clipboard.writeText(location.href);
    said.textContent = "The link is copied. It has no token: it opens in a browser that has seen the address that infl view printed.";
    event.target.textContent = "Copied";
  } catch {
    said.textContent = "This browser does not let a page copy: take the link from the address bar.";
    event.target.textContent = "Copy the address bar";
  }
  setTimeout(() => (event.target.textContent = "Copy link"), 3000);
});

// A click or a drag on the image fills in the form. The answer is shown without loading a new page.
if (form) {
  const image = document.querySelector("#image img");
  const mark = document.querySelector("#image .mark");
  const area = document.querySelector("#image .area");
  const answer = document.getElementById("answer");
  const [height, width] = [Number(form.dataset.height), Number(form.dataset.width)];
  let clicks = 0;
  let start = null;

  function show() {
    if (!image) return;
    const [y, x, h, w] = ["y", "x", "h", "w"].map((name) => Number(form[name].value || 1));
    const whole = h > 1 || w > 1;
    mark.hidden = whole;
    area.hidden = !whole;
    mark.style.left = `${(100 * (x + 0.5)) / width}%`;
    mark.style.top = `${(100 * (y + 0.5)) / height}%`;
    area.style.left = `${(100 * x) / width}%`;
    area.style.top = `${(100 * y) / height}%`;
    area.style.width = `${(100 * w) / width}%`;
    area.style.height = `${(100 * h) / height}%`;
  }

  async function explain() {
    const mine = ++clicks;
    const words = new URLSearchParams(new FormData(form));
    show();
    const reply = await fetch(`${form.dataset.answer}?${words}`);
    const text = await reply.text();
    if (mine !== clicks) return; // a later click replaces this one
    if (reply.ok) {
      answer.innerHTML = text;
      keepAddress(words);
    } else answer.textContent = new DOMParser().parseFromString(text, "text/html").querySelector("main p")?.textContent ?? "no answer";
  }

  // The pixel under the pointer.
  function pixel(event) {
    const box = image.getBoundingClientRect();
    const at = (part, count) => Math.max(0, Math.min(count - 1, Math.floor(part * count)));
    return [at((event.clientY - box.top) / box.height, height), at((event.clientX - box.left) / box.width, width)];
  }

  function fill(from, to) {
    const [y, x] = [Math.min(from[0], to[0]), Math.min(from[1], to[1])];
    const [h, w] = [Math.abs(from[0] - to[0]) + 1, Math.abs(from[1] - to[1]) + 1];
    form.y.value = y;
    form.x.value = x;
    form.h.value = h > 1 || w > 1 ? h : "";
    form.w.value = h > 1 || w > 1 ? w : "";
    show();
  }

  image?.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    start = { at: pixel(event), x: event.clientX, y: event.clientY };
    image.setPointerCapture(event.pointerId);
  });
  // A hand is never quite still: a drag of less than some screen pixels is a click.
  const end = (event) => (Math.hypot(event.clientX - start.x, event.clientY - start.y) < 6 ? start.at : pixel(event));
  image?.addEventListener("pointermove", (event) => {
    if (start) fill(start.at, end(event));
  });
  image?.addEventListener("pointerup", (event) => {
    if (!start) return;
    fill(start.at, end(event));
    start = null;
    explain();
  });
  image?.addEventListener("pointercancel", () => (start = null));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    explain();
  });
  if (form.x.value && form.y.value) show();
}

// Keys. A letter typed into a field is a letter.
const help = document.getElementById("help");
document.getElementById("keys").addEventListener("click", () => help.showModal());

function step(by) {
  const all = [...document.querySelectorAll(".item a")];
  const at = all.indexOf(document.activeElement);
  const next = all[at < 0 ? (by > 0 ? 0 : all.length - 1) : at + by];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const here = document.activeElement;
  const typing = here.matches("input:not([type=checkbox]), select, textarea");
  if (event.key === "Escape") {
    if (here !== document.body) here.blur();
    else if (location.pathname !== "/") document.getElementById("up").click();
    return;
  }
  if (typing || here.matches("audio")) return;
  const marked = here.matches(".item a");
  const keys = {
    j: () => step(1),
    k: () => step(-1),
    ArrowDown: marked && (() => step(1)),
    ArrowUp: marked && (() => step(-1)),
    ArrowRight: document.querySelector("[rel=next]") && (() => document.querySelector("[rel=next]").click()),
    ArrowLeft: document.querySelector("[rel=prev]") && (() => document.querySelector("[rel=prev]").click()),
    x: () => here.closest(".item")?.querySelector("[name=pick]")?.click(),
    "/": () => (filter ?? form)?.querySelector("select, input:not([type=hidden])")?.focus(),
    "?": () => help.showModal(),
  };
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
