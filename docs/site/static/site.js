// Code that is wider than the page can be scrolled by keyboard.
window.addEventListener("load", () => {
  for (const code of document.querySelectorAll("pre")) {
    if (code.scrollWidth > code.clientWidth) code.tabIndex = 0;
  }
});
