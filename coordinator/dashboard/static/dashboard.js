// Keeps a page of the dashboard up to date: on every change that the server announces, the page is fetched
// again and the sections that differ are put in place of the old ones. Without script the page reloads itself.
"use strict";
(() => {
  const body = document.body;
  const shown = new Map();
  let offset_s = Number(body.dataset.now) - Date.now() / 1000; // the server's clock minus this one's
  let busy = false;
  let again = false;

  const ago = (s) => s < 5 ? "just now" : s < 60 ? `${Math.floor(s)} s ago` : s < 3600
    ? `${Math.floor(s / 60)} min ago` : s < 86400 ? `${Math.floor(s / 3600)} h ago` : `${Math.floor(s / 86400)} d ago`;
  const left = (s) => s <= 0 ? "deadline reached" : s < 60 ? `${Math.ceil(s)} s left` : s < 3600
    ? `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s left` : `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min left`;
  const write = (element, text) => { if (element.textContent !== text) element.textContent = text; };

  function tell_times() {
    const now_s = Date.now() / 1000 + offset_s;
    for (const e of document.querySelectorAll("[data-ago]")) write(e, ago(now_s - Number(e.dataset.ago)));
    for (const e of document.querySelectorAll("[data-deadline]")) write(e, left(Number(e.dataset.deadline) - now_s));
  }

  function tell_connection(state, text) {
    const line = document.getElementById("connection");
    line.hidden = false;
    line.dataset.state = state;
    write(document.getElementById("connection-text"), text);
  }

  function swap(section, fresh) {
    if (shown.get(section.id) === fresh.innerHTML) return;
    shown.set(section.id, fresh.innerHTML);
    const open = [...section.querySelectorAll("details[open]")].map((e) => e.id);
    const scrolled = [...section.querySelectorAll(".scroll")].map((e) => e.scrollLeft);
    const reachable = "a[href], summary, [tabindex], button, input";
    const focus = [...section.querySelectorAll(reachable)].indexOf(document.activeElement);
    section.innerHTML = fresh.innerHTML;
    for (const e of section.querySelectorAll("details")) e.open = open.includes(e.id);
    section.querySelectorAll(".scroll").forEach((e, i) => { e.scrollLeft = scrolled[i] || 0; });
    if (focus >= 0) section.querySelectorAll(reachable)[focus]?.focus({ preventScroll: true });
    const news = section.querySelector("[data-news]");
    if (news) write(document.getElementById("news"), news.textContent); // read aloud
  }

  async function refresh() {
    if (busy) { again = true; return; }
    busy = true;
    try {
      do {
        again = false;
        const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
        if (answer.status === 401) { location.reload(); return; }
        if (!answer.ok) return;
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        offset_s = Number(page.body.dataset.now) - Date.now() / 1000;
        for (const section of document.querySelectorAll("[data-live]")) {
          const fresh = page.getElementById(section.id);
          if (fresh) swap(section, fresh);
        }
        tell_times();
        await new Promise((done) => setTimeout(done, 500)); // at most two fetches a second
      } while (again);
    } catch (error) {
      tell_connection("lost", "No answer. Trying again.");
    } finally {
      busy = false;
    }
  }

  // A browser opens six connections to one server: a page that nobody looks at gives its own back.
  let events = null;
  let since = body.dataset.since;

  function listen() {
    if (document.hidden) { events?.close(); events = null; return; }
    if (events) return;
    events = new EventSource(`${body.dataset.events}?since=${since}`);
    events.addEventListener("open", () => tell_connection("live", "Live"));
    events.addEventListener("error", () => {
      tell_connection("lost", "No connection. Trying again.");
      if (events?.readyState === EventSource.CLOSED) { events = null; setTimeout(listen, 5000); } // refused: too many
    });
    events.addEventListener("change", (event) => {
      since = event.lastEventId;
      const { tasks } = JSON.parse(event.data); // none named: any may have changed
      if (!body.dataset.task || !tasks.length || tasks.includes(body.dataset.task)) refresh();
    });
  }

  document.addEventListener("visibilitychange", listen);
  listen();
  setInterval(tell_times, 1000);
  setInterval(() => { if (!document.hidden) refresh(); }, 60000); // that a device has fallen silent is no event
})();
