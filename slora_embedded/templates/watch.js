"use strict";
// Follows the run: each line of its events as it is written, and its report.
const byId = (id) => document.getElementById(id);
const states = {
  waiting: "Waiting for a run to begin",
  running: "The run is going on",
  finished: "The run has finished",
  failed: "The run has failed",
  interrupted: "The run was interrupted",
  gone: "The run directory is gone",
};
const most = 500; // events that the page keeps
let wanted = false;
let busy = false;

async function redraw() {
  wanted = true;
  if (busy) return;
  busy = true;
  while (wanted) {
    wanted = false;
    const begun = performance.now();
    try {
      const answer = await fetch("report");
      if (answer.status === 200) show(await answer.text());
    } catch {
      // The server has ended; the stream says so.
    }
    // Drawing takes at most a fifth of a core from the run.
    const rest = Math.max(500, 4 * (performance.now() - begun));
    await new Promise((resolve) => setTimeout(resolve, rest));
  }
  busy = false;
}

function show(html) {
  const opened = new Set(
    [...document.querySelectorAll("#report details[open] > summary")].map((s) => s.textContent),
  );
  const found = new DOMParser().parseFromString(html, "text/html");
  byId("report").replaceChildren(...found.body.childNodes);
  for (const summary of document.querySelectorAll("#report summary")) {
    if (opened.has(summary.textContent)) summary.parentElement.open = true;
  }
  document.title = byId("report").querySelector("h1")?.textContent ?? document.title;
}

const source = new EventSource("events");
source.onmessage = (message) => {
  const told = JSON.parse(message.data);
  const row = document.createElement("li");
  const at = document.createElement("time");
  at.textContent = told.at;
  row.append(at, told.words);
  row.className = told.kind;
  byId("events").prepend(row);
  while (byId("events").children.length > most) byId("events").lastChild.remove();
  if (told.kind === "round") byId("last").textContent = told.words;
  redraw();
};
source.addEventListener("anew", () => {
  byId("events").replaceChildren();
  byId("last").textContent = "";
});
source.addEventListener("state", (message) => {
  const { state, run } = JSON.parse(message.data);
  byId("state").textContent = states[state] + (run ? `: ${run}` : "");
  document.body.dataset.state = state;
  if (state === "gone" || state === "waiting") byId("report").replaceChildren();
  else redraw();
});
source.onerror = () => {
  byId("state").textContent = "`slora watch` has ended, or cannot be reached";
  document.body.dataset.state = "lost";
};
