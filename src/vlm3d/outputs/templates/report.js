(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const viewer = document.getElementById("viewer");
  const image = document.getElementById("viewer-image");
  const slider = document.getElementById("viewer-slider");
  const position = document.getElementById("viewer-position");
  const label = document.getElementById("viewer-label");
  const outlines = document.getElementById("outlines");
  const paths = [...viewer.querySelectorAll("path[data-lesion]")];
  const links = [...document.querySelectorAll("[data-slice]")];
  const pieces = links.filter((link) => link.dataset.ring);
  const scouts = [...document.querySelectorAll("[data-top-slice]")];
  let windowKey = data.windows[0].key;
  const ring = document.getElementById("viewer-ring");
  const caption = document.getElementById("viewer-focus");
  let current = data.start;
  let focus = null;
  document.documentElement.classList.add("js");

  const nearest = (slice) => data.slices.reduce(
    (best, entry, i) =>
      Math.abs(entry.index - slice) < Math.abs(data.slices[best].index - slice) ? i : best, 0);

  const showFocus = (index) => {
    const near = focus !== null && Math.abs(index - focus.slice) <= focus.reach;
    caption.hidden = !near;
    ring.hidden = !near || !focus.ring;
    paths.forEach((path) => path.classList.toggle("focus", near && path.dataset.lesion === focus.lesion));
    document.querySelectorAll(".sentence").forEach((sentence) =>
      sentence.classList.toggle("current-sentence", near && sentence === focus.sentence));
    if (!near) return;
    if (focus.ring) [ring.style.left, ring.style.top, ring.style.width, ring.style.height] = focus.ring;
    caption.firstElementChild.textContent = focus.name + " \u00b7";
    caption.lastElementChild.hash = focus.sentence ? focus.sentence.id : "report";
  };

  const focusOn = (link) => {
    focus = {
      slice: data.slices[nearest(Number(link.dataset.slice))].index,
      reach: Number(link.dataset.reach || 0),
      lesion: link.dataset.focus,
      ring: link.dataset.ring?.split(" ").map((percent) => `${percent}%`),
      name: link.dataset.name,
      sentence: link.closest(".sentence"),
    };
  };

  const show = (place) => {
    current = Math.min(data.slices.length - 1, Math.max(0, place));
    const entry = data.slices[current];
    const z = entry.z.toFixed(1).replace("-", "\u2212");
    const text = `Slice ${entry.index + 1} of ${data.total}, z ${z} mm`;
    image.src = "data:image/jpeg;base64," + entry[windowKey];
    image.alt = `Axial ${text}, ${windowKey} window`;
    paths.forEach((path) => path.setAttribute("d", entry.outlines[path.dataset.lesion] || ""));
    slider.value = current;
    slider.setAttribute("aria-valuetext", text);
    position.textContent = text;
    label.textContent = data.windows.find((w) => w.key === windowKey).label;
    pieces.forEach((link) => link.closest("tr, article")?.classList.toggle(
      "current", Number(link.dataset.slice) === entry.index));
    showFocus(entry.index);
    scouts.forEach((scout) => {
      const top = Number(scout.dataset.topSlice), bottom = Number(scout.dataset.bottomSlice);
      const line = scout.querySelector(".scout-line");
      line.style.top = `${(100 * (top - entry.index + 0.5)) / (top - bottom + 1)}%`;
    });
  };

  const setWindow = (key) => {
    windowKey = key;
    document.querySelector(`input[name=viewer-window][value=${key}]`).checked = true;
    show(current);
  };

  slider.max = data.slices.length - 1;
  slider.addEventListener("input", () => show(Number(slider.value)));
  document.querySelectorAll("input[name=viewer-window]").forEach((radio) =>
    radio.addEventListener("change", () => setWindow(radio.value)));

  viewer.addEventListener("wheel", (event) => {
    const next = current + Math.sign(event.deltaY);
    if (event.ctrlKey || next < 0 || next >= data.slices.length) return;
    event.preventDefault();
    show(next);
  }, { passive: false });

  viewer.addEventListener("keydown", (event) => {
    const steps = { ArrowDown: 1, ArrowUp: -1, ArrowRight: 1, ArrowLeft: -1, PageDown: 5, PageUp: -5 };
    if (event.key in steps) show(current + steps[event.key]);
    else if (event.key === "Home") show(0);
    else if (event.key === "End") show(data.slices.length - 1);
    else if (event.key === "w") setWindow(data.windows.find((w) => w.key !== windowKey).key);
    else if (event.key === "o") outlines.checked = !outlines.checked;
    else return;
    event.preventDefault();
  });

  const jump = (slice) => {
    show(nearest(slice));
    document.getElementById("images").scrollIntoView({ block: "start" });
    viewer.focus({ preventScroll: true });
  };
  links.forEach((link) => {
    const target = (pieces.includes(link) && link.closest("tr")) || link;
    target.addEventListener("click", (event) => {
      if (event.target.closest("a") && !event.target.closest("[data-slice]")) return;
      event.preventDefault();
      focusOn(link);
      jump(Number(link.dataset.slice));
    });
  });

  scouts.forEach((scout) => scout.addEventListener("click", (event) => {
    const frame = scout.getBoundingClientRect();
    const top = Number(scout.dataset.topSlice), bottom = Number(scout.dataset.bottomSlice);
    show(nearest(top - ((event.clientY - frame.top) / frame.height) * (top - bottom + 1) + 0.5));
  }));

  show(current);
})();
