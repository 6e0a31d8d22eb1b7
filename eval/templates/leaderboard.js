"use strict";
// What is shown is told by the address (#benchmark=0&show=differ&search=cat&page=1&id=…), so that it can be passed on.
// Text of models and data sets goes into the page as text only, never as markup.
const PAGE = 50;
const RIGHT = 0.5; // of a question's worth
const at = (id) => document.getElementById(id);
const models = JSON.parse(at("models-data").textContent);
const loaded = new Map();
const START = { benchmark: "0", show: "all", category: "", search: "", page: "0", id: "" };
let state = START;

// Each benchmark's questions are read when they are first shown.
function load(index) {
  if (!loaded.has(index)) {
    const data = JSON.parse(at(`questions-${index}`).textContent);
    data.questions = data.questions.map(([id, text, references, categories, media, answers, worths]) => ({
      id, text, references, categories, media, answers, worths, right: worths.map((worth) => worth !== null && worth >= RIGHT),
    }));
    loaded.set(index, data);
  }
  return loaded.get(index);
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// The choices of a benchmark: a test of a question by its key in the address.
function choices(data) {
  const scored = data.questions.some((question) => question.worths.some((worth) => worth !== null));
  const found = [["all", "all", () => true]];
  if (!scored) return found;
  const several = data.models.length > 1;
  if (several) {
    found.push(["differ", "flipped: models differ", (q) => new Set(q.worths).size > 1]);
    found.push(["right", "right: all models", (q) => q.right.every(Boolean)]);
    found.push(["wrong", "wrong: all models", (q) => !q.right.some(Boolean)]);
  }
  data.models.forEach((model, i) => {
    const name = models[model];
    found.push([`right-${i}`, `right: ${name}`, (q) => q.right[i]]);
    found.push([`wrong-${i}`, `wrong: ${name}`, (q) => !q.right[i]]);
    if (!several) return;
    found.push([`only-${i}`, `right: only ${name}`, (q) => q.right.every((right, j) => right === (i === j))]);
    found.push([`not-${i}`, `wrong: only ${name}`, (q) => q.right.every((right, j) => right === (i !== j))]);
  });
  return found;
}

function haystack(question) {
  question.words ??= [question.id, question.text, ...question.references, ...question.answers].join("\n").toLowerCase();
  return question.words;
}

function chosen(data) {
  if (state.id) return data.questions.filter((question) => question.id === state.id);
  const test = (choices(data).find(([key]) => key === state.show) ?? choices(data)[0])[2];
  const category = state.category === "" ? null : Number(state.category);
  const words = state.search.toLowerCase().trim();
  return data.questions.filter(
    (question) =>
      test(question) &&
      (category === null || question.categories.includes(category)) &&
      (!words || haystack(question).includes(words))
  );
}

function mark(worth) {
  const [sign, told, style] =
    worth === null ? ["·", "not scored", "soft"]
    : worth >= 1 ? ["✓", "right", "good"]
    : worth >= RIGHT ? ["◐", "partly right", "good"]
    : worth > 0 ? ["◔", "mostly wrong", "bad"]
    : ["✗", "wrong", "bad"];
  return [sign, told, style];
}

function marks(question, data) {
  const made = element("span", { class: "marks" });
  question.worths.forEach((worth, i) => {
    const [sign, told, style] = mark(worth);
    const label = `${models[data.models[i]]}: ${told}`;
    made.append(element("span", { class: style, role: "img", "aria-label": label, title: label }, sign));
  });
  return made;
}

function media(question, data) {
  const made = element("div");
  for (const place of question.media) {
    const pictures = data.pictures[place] ?? [];
    const name = data.media[place];
    if (pictures.length) {
      const strip = element("div", { class: "pictures" });
      pictures.forEach((picture, i) => {
        const image = new Image();
        image.alt = pictures.length > 1 ? `${name}, frame ${i + 1} of ${pictures.length}` : name;
        image.src = picture;
        strip.append(image);
      });
      made.append(strip);
    } else {
      const why = place < data.pictures.length ? "could not be read when this page was made" : "is not on this page";
      made.append(element("p", { class: "soft" }, `${name} ${why}`));
    }
  }
  return made;
}

function inside(question, data) {
  const table = element("table", { class: "answers" });
  question.answers.forEach((answer, i) => {
    const [sign, told, style] = mark(question.worths[i]);
    const worth = question.worths[i] === null ? "" : ` (${question.worths[i]})`;
    table.append(
      element("tr", {},
        element("th", { scope: "row" }, models[data.models[i]]),
        element("td", {}, answer || "(nothing)"),
        element("td", { class: style }, `${sign} ${told}${worth}`)
      )
    );
  });
  const link = element("a", { href: `#${new URLSearchParams({ benchmark: state.benchmark, id: question.id })}` }, question.id);
  return element("div", { class: "inside" },
    media(question, data),
    element("p", {}, question.text),
    element("p", { class: "soft" }, question.references.length ? `answer: ${question.references.join(" / ")}` : "the answer is not public"),
    element("div", { class: "wide" }, table),
    element("p", { class: "soft" }, link, ...question.categories.map((category) => ` · ${data.categories[category]}`))
  );
}

function item(question, data) {
  const title = question.text.split("\n").find((line) => line.trim()) ?? question.id;
  const details = element("details", {}, element("summary", {}, marks(question, data), title));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(inside(question, data));
  });
  if (state.id) {
    details.append(inside(question, data));
    details.open = true;
  }
  return element("li", { "data-id": question.id }, details);
}

function options(select, pairs, value) {
  select.replaceChildren(...pairs.map(([key, text]) => new Option(text, key)));
  select.value = value;
}

function render() {
  const data = load(state.benchmark);
  const found = chosen(data);
  const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
  const page = Math.min(Math.max(0, Math.floor(Number(state.page)) || 0), last);
  state.page = String(page);
  const shown = found.slice(page * PAGE, (page + 1) * PAGE);
  at("list").replaceChildren(...shown.map((question) => item(question, data)));
  const range = last ? `${page * PAGE + 1}–${page * PAGE + shown.length} of ` : "";
  at("count").textContent = `${range}${found.length.toLocaleString("en")} ${found.length === 1 ? "question" : "questions"}`;
  at("order").textContent = `; right (✓) or wrong (✗) in the order of ${data.models.map((model) => models[model]).join(" · ")}`;
  at("previous").disabled = page === 0;
  at("next").disabled = page === last;
  at("single").hidden = !state.id;
}

function controls() {
  const data = load(state.benchmark);
  at("benchmark").value = state.benchmark;
  options(at("show"), choices(data), state.show);
  options(at("category"), [["", "all"], ...data.categories.map((name, i) => [String(i), name])], state.category);
  at("search").value = state.search;
}

function change(changes) {
  state = { ...state, page: "0", id: "", ...changes };
  const told = Object.entries(state).filter(([key, value]) => value !== START[key]);
  history.replaceState(null, "", `#${new URLSearchParams(told)}`);
  render();
}

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = Object.fromEntries(Object.entries(START).map(([key, otherwise]) => [key, given.get(key) ?? otherwise]));
  if (!at(`questions-${state.benchmark}`)) state.benchmark = START.benchmark;
  controls();
  render();
  if (state.id) at("questions-title").scrollIntoView();
}

function sort(table, place, direction) {
  const sign = direction === "ascending" ? 1 : -1;
  const value = (row) => row.cells[place].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [x, y] = [value(one), value(other)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // gaps come last
    return sign * (place === 0 ? x.localeCompare(y) : Number(x) - Number(y));
  });
  table.tBodies[0].append(...rows);
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    if (i === place) cell.setAttribute("aria-sort", direction);
    else cell.removeAttribute("aria-sort");
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, place) => {
    cell.querySelector("button").addEventListener("click", () => {
      const first = place === 0 ? "ascending" : "descending";
      const second = place === 0 ? "descending" : "ascending";
      sort(table, place, cell.getAttribute("aria-sort") === first ? second : first);
    });
  });
}
sort(document.querySelector("table.sortable"), 1, "descending");
at("benchmark").addEventListener("change", () => {
  change({ benchmark: at("benchmark").value, show: "all", category: "", search: "" });
  controls();
});
at("show").addEventListener("change", () => change({ show: at("show").value }));
at("category").addEventListener("change", () => change({ category: at("category").value }));
at("search").addEventListener("input", () => change({ search: at("search").value }));
at("all").addEventListener("click", () => change({}));
at("previous").addEventListener("click", () => change({ page: String(Number(state.page) - 1) }));
at("next").addEventListener("click", () => change({ page: String(Number(state.page) + 1) }));
// An address may also be a place on the page, which leaves what is shown as it is.
addEventListener("hashchange", () => { if (!at(location.hash.slice(1))) fromAddress(); });
fromAddress();
