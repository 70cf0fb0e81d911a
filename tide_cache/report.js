"use strict";
const tip = document.getElementById("tip");
function show(event) {
  const token = event.target.closest ? event.target.closest("[data-said]") : null;
  tip.hidden = token === null;
  if (token !== null) {
    tip.textContent = token.textContent + "\n" + token.dataset.said.split(" | ").join("\n");
  }
}
for (const kind of ["mouseover", "focusin", "click"]) {
  document.addEventListener(kind, show);
}
