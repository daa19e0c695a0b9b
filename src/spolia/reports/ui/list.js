// The list of runs is asked again every five seconds, while the page is seen and nobody chooses from it.
"use strict";
{
  const list = document.getElementById("list"), said = document.getElementById("said");
  const look = async () => {
    const busy = list.contains(document.activeElement) || list.querySelector("input:checked");
    if (!document.hidden && !busy) {
      try {
        const answer = await fetch("./");
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        const fresh = page.getElementById("list");
        if (answer.ok && fresh && fresh.innerHTML !== list.innerHTML) list.innerHTML = fresh.innerHTML;
        said.className = "sr";
        said.textContent = "";
      } catch {
        said.className = "quiet";
        said.textContent = "spolia ui does not answer; start it again.";
      }
    }
    setTimeout(look, 5000);
  };
  setTimeout(look, 5000);
}
