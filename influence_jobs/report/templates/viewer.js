"use strict";

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

// A click on the image fills in the form. The answer is shown without loading a new page.
const form = document.getElementById("point");
if (form) {
  const image = document.querySelector("#image img");
  const mark = document.querySelector("#image .mark");
  const answer = document.getElementById("answer");
  let clicks = 0;

  async function explain() {
    const mine = ++clicks;
    const words = new URLSearchParams(new FormData(form));
    if (image) {
      mark.style.left = `${(100 * (Number(form.x.value) + 0.5)) / image.naturalWidth}%`;
      mark.style.top = `${(100 * (Number(form.y.value) + 0.5)) / image.naturalHeight}%`;
      mark.hidden = false;
    }
    const reply = await fetch(`${form.dataset.answer}?${words}`);
    const text = await reply.text();
    if (mine !== clicks) return; // a later click replaces this one
    if (reply.ok) answer.innerHTML = text;
    else answer.textContent = new DOMParser().parseFromString(text, "text/html").querySelector("main p")?.textContent ?? "no answer";
  }

  image?.addEventListener("click", (event) => {
    const box = image.getBoundingClientRect();
    form.x.value = Math.min(image.naturalWidth - 1, Math.floor(((event.clientX - box.left) / box.width) * image.naturalWidth));
    form.y.value = Math.min(image.naturalHeight - 1, Math.floor(((event.clientY - box.top) / box.height) * image.naturalHeight));
    explain();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    explain();
  });
  if (form.x.value && form.y.value && image?.complete) explain();
}
