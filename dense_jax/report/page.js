const data = JSON.parse(document.getElementById("data").textContent);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The row that the mouse, or else the keyboard, is at is lit in the table and in all charts.
let lit;
function light(event) {
  const under = event.type === "mouseover" ? event.target : null;
  const at = under?.closest("[data-row]") ?? document.activeElement.closest("[data-row]");
  if (at?.dataset.row === lit) return;
  lit = at?.dataset.row;
  for (const element of document.querySelectorAll("[data-row]"))
    element.classList.toggle("lit", element.dataset.row === lit);
  document.body.classList.toggle("some-lit", at !== null);
}
for (const type of ["mouseover", "focusin", "focusout"])
  document.addEventListener(type, light);

function options(select, rows, chosen) {
  rows.forEach((row, i) => select.add(new Option(row.label, i, i === chosen, i === chosen)));
}

function drawMatrix({classes, counts}) {
  const upright = name => make("th", {}, make("span", {textContent: name}));
  const corner = make("th", {textContent: "true ↓ predicted →"});
  const head = make("tr", {}, corner, ...classes.map(upright));
  const lines = counts.map((line, i) => {
    const total = line.reduce((sum, count) => sum + count, 0);
    const cells = line.map((count, j) => {
      const percent = 100 * count / total;
      const title = `${classes[i]} predicted as ${classes[j]}: ` +
        `${count.toLocaleString("en")} of ${total.toLocaleString("en")} pixels`;
      if (!count) return make("td", {title, textContent: total ? "·" : "–"});
      const shown = percent < 1 ? "<1" : percent.toFixed(0);
      const cell = make("td", {title, textContent: shown, className: percent > 80 ? "strong" : ""});
      cell.style.background = `color-mix(in srgb, #0072b2 ${percent}%, transparent)`;
      return cell;
    });
    return make("tr", {}, make("th", {textContent: classes[i]}), ...cells);
  });
  document.getElementById("matrix").replaceChildren(
    make("thead", {}, head), make("tbody", {}, ...lines));
}

if (data.matrices.length) {
  const select = document.getElementById("matrix-row");
  options(select, data.matrices, 0);
  select.onchange = () => drawMatrix(data.matrices[select.value]);
  select.onchange();
}

const VIEWS = ["input", "truth", "prediction", "errors"];

// One picture over the other: half way from one view to the next, both are seen.
function panel(image, row, i) {
  const picture = (src, className) => make("img", {src, className, alt: ""});
  const layers = image.input === null ? [make("div", {}, picture(row.predictions[i], "sharp"))] : [
    make("div", {}, picture(image.input, "")),
    make("div", {}, picture(image.truth, "sharp")),
    make("div", {}, picture(row.predictions[i], "sharp")),
    make("div", {}, picture(image.input, "dim"), picture(row.errors[i], "sharp")),
  ];
  const box = make("div", {className: "layers"}, ...layers);
  const first = layers[0].firstChild;
  first.onload = () => { box.style.aspectRatio = `${first.naturalWidth} / ${first.naturalHeight}`; };
  const score = row.scores[i] === null ? "no score" : `mean IoU ${row.scores[i].toFixed(3)}`;
  return make("div", {}, box, make("span", {textContent: `${row.row + 1}: ${score}`}));
}

function figure(image, i, left, right, view) {
  const pair = make("div", {className: "pair"}, panel(image, left, i), panel(image, right, i));
  const parts = [make("figcaption", {textContent: image.name}), pair];
  if (image.input !== null) {
    const slider = make("input", {type: "range", min: 0, max: 3, step: 0.5, value: view});
    slider.setAttribute("aria-label", `View of ${image.name}`);
    slider.oninput = () => {
      for (const box of pair.querySelectorAll(".layers"))
        [...box.children].forEach((layer, k) => {
          layer.style.opacity = Math.min(1, Math.max(0, slider.value - k + 1));
        });
      const [from, to] = [Math.floor(slider.value), Math.ceil(slider.value)];
      slider.setAttribute("aria-valuetext", VIEWS[from] + (from < to ? ` and ${VIEWS[to]}` : ""));
    };
    slider.oninput();
    const stops = VIEWS.map(name => make("span", {textContent: name}));
    parts.push(slider, make("div", {className: "stops"}, ...stops));
  }
  return make("figure", {}, ...parts);
}

if (data.gallery) {
  const {images, rows} = data.gallery;
  const [left, right, all] = ["left", "right", "all"].map(id => document.getElementById(id));
  options(left, rows, 0);
  options(right, rows, Math.min(1, rows.length - 1));
  const draw = () => {
    const [one, other] = [rows[left.value], rows[right.value]];
    const worstFirst = images.map((_, i) => i).sort(
      (i, j) => (one.scores[i] ?? 2) - (one.scores[j] ?? 2));
    document.getElementById("images").replaceChildren(
      ...worstFirst.map(i => figure(images[i], i, one, other, all.value)));
  };
  left.onchange = right.onchange = draw;
  all.oninput = () => {
    for (const slider of document.querySelectorAll("#images input")) {
      slider.value = all.value;
      slider.oninput();
    }
  };
  document.getElementById("of-all").hidden = images[0].input === null;
  draw();
}
