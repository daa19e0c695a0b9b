// The live part of a run is asked again every two seconds, while the run goes on and the page is seen.
"use strict";
{
  const live = document.getElementById("live"), said = document.getElementById("said");
  let shown = "", state = "running";
  const look = async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch(live.dataset.from);
        const text = await answer.text();
        if (answer.ok && text !== shown) {
          const held = live.contains(document.activeElement) ? document.activeElement.id : "";
          live.innerHTML = shown = text;
          document.getElementById(held)?.focus({ preventScroll: true });
        }
        const now = live.querySelector("[data-state]");
        if (answer.ok && now.dataset.state !== state) said.textContent = now.dataset.said;
        state = answer.ok ? now.dataset.state : state;
        said.className = "sr";
      } catch {
        said.className = "quiet";
        said.textContent = "spolia ui does not answer; start it again.";
      }
    }
    if (state === "running") setTimeout(look, 2000);
  };
  state = live.querySelector("[data-state]").dataset.state;
  if (state === "running") setTimeout(look, 2000);
}
