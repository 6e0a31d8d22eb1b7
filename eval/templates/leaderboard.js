"use strict";
// The view is stored in the URL (#benchmark=0&show=differ&search=cat&page=1&id=…), so that it can be shared.
// Text from models and datasets is inserted as text only, never as markup.
const PAGE = 50;
const CORRECT = 0.5; // the least score of an answer that counts as correct
const at = (id) => document.getElementById(id);
const models = JSON.parse(at("models-data").textContent);
const loaded = new Map();
const START = { benchmark: "0", show: "all", category: "", search: "", page: "0", id: "" };
let state = START;

// A benchmark's questions are parsed when they are first displayed.
function load(index) {
  if (!loaded.has(index)) {
    const data = JSON.parse(at(`questions-${index}`).textContent);
    data.questions = data.questions.map(([id, text, references, categories, media, answers, scores]) => ({
      id, text, references, categories, media, answers, scores,
      correct: scores.map((score) => score !== null && score >= CORRECT),
    }));
    loaded.set(index, data);
  }
  return loaded.get(index);
}

function element(name, attributes = {}, ...children) {
  const created = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) created.setAttribute(key, value);
  created.append(...children);
  return created;
}

// The filters of a benchmark: [key in the URL, label, test of a question].
function filters(data) {
  const scored = data.questions.some((question) => question.scores.some((score) => score !== null));
  const list = [["all", "all", () => true]];
  if (!scored) return list;
  const several = data.models.length > 1;
  if (several) {
    list.push(["differ", "models differ", (q) => new Set(q.scores).size > 1]);
    list.push(["right", "correct: all models", (q) => q.correct.every(Boolean)]);
    list.push(["wrong", "wrong: all models", (q) => !q.correct.some(Boolean)]);
  }
  data.models.forEach((model, i) => {
    const name = models[model];
    list.push([`right-${i}`, `correct: ${name}`, (q) => q.correct[i]]);
    list.push([`wrong-${i}`, `wrong: ${name}`, (q) => !q.correct[i]]);
    if (!several) return;
    list.push([`only-${i}`, `correct: only ${name}`, (q) => q.correct.every((correct, j) => correct === (i === j))]);
    list.push([`not-${i}`, `wrong: only ${name}`, (q) => q.correct.every((correct, j) => correct === (i !== j))]);
  });
  return list;
}

function searchText(question) {
  question.searchText ??= [question.id, question.text, ...question.references, ...question.answers].join("\n").toLowerCase();
  return question.searchText;
}

function matching(data) {
  if (state.id) return data.questions.filter((question) => question.id === state.id);
  const test = (filters(data).find(([key]) => key === state.show) ?? filters(data)[0])[2];
  const category = state.category === "" ? null : Number(state.category);
  const search = state.search.toLowerCase().trim();
  return data.questions.filter(
    (question) =>
      test(question) &&
      (category === null || question.categories.includes(category)) &&
      (!search || searchText(question).includes(search))
  );
}

// The symbol, label and style of a score.
function mark(score) {
  return (
    score === null ? ["·", "not scored", "soft"]
    : score >= 1 ? ["✓", "correct", "good"]
    : score >= CORRECT ? ["◐", "partly correct", "good"]
    : score > 0 ? ["◔", "mostly wrong", "bad"]
    : ["✗", "wrong", "bad"]
  );
}

function marks(question, data) {
  const span = element("span", { class: "marks" });
  question.scores.forEach((score, i) => {
    const [symbol, meaning, style] = mark(score);
    const label = `${models[data.models[i]]}: ${meaning}`;
    span.append(element("span", { class: style, role: "img", "aria-label": label, title: label }, symbol));
  });
  return span;
}

function media(question, data) {
  const container = element("div");
  for (const place of question.media) {
    const urls = data.images[place] ?? [];
    const name = data.media[place];
    if (urls.length) {
      const strip = element("div", { class: "images" });
      urls.forEach((url, i) => {
        const image = new Image();
        image.alt = urls.length > 1 ? `${name}, frame ${i + 1} of ${urls.length}` : name;
        image.src = url;
        strip.append(image);
      });
      container.append(strip);
    } else {
      const why = place < data.images.length ? "could not be read when this page was made" : "is not on this page";
      container.append(element("p", { class: "soft" }, `${name} ${why}`));
    }
  }
  return container;
}

function details(question, data) {
  const table = element("table", { class: "answers" });
  question.answers.forEach((answer, i) => {
    const [symbol, meaning, style] = mark(question.scores[i]);
    const score = question.scores[i] === null ? "" : ` (${question.scores[i]})`;
    table.append(
      element("tr", {},
        element("th", { scope: "row" }, models[data.models[i]]),
        element("td", {}, answer || "(empty)"),
        element("td", { class: style }, `${symbol} ${meaning}${score}`)
      )
    );
  });
  const link = element("a", { href: `#${new URLSearchParams({ benchmark: state.benchmark, id: question.id })}` }, question.id);
  return element("div", { class: "inside" },
    media(question, data),
    element("p", {}, question.text),
    element("p", { class: "soft" }, question.references.length ? `reference: ${question.references.join(" / ")}` : "the reference is not public"),
    element("div", { class: "wide" }, table),
    element("p", { class: "soft" }, link, ...question.categories.map((category) => ` · ${data.categories[category]}`))
  );
}

function item(question, data) {
  const title = question.text.split("\n").find((line) => line.trim()) ?? question.id;
  const entry = element("details", {}, element("summary", {}, marks(question, data), title));
  entry.addEventListener("toggle", () => {
    if (entry.open && entry.children.length === 1) entry.append(details(question, data));
  });
  if (state.id) {
    entry.append(details(question, data));
    entry.open = true;
  }
  return element("li", { "data-id": question.id }, entry);
}

function options(select, pairs, value) {
  select.replaceChildren(...pairs.map(([key, text]) => new Option(text, key)));
  select.value = value;
}

function render() {
  const data = load(state.benchmark);
  const questions = matching(data);
  const last = Math.max(0, Math.ceil(questions.length / PAGE) - 1);
  const page = Math.min(Math.max(0, Math.floor(Number(state.page)) || 0), last);
  state.page = String(page);
  const visible = questions.slice(page * PAGE, (page + 1) * PAGE);
  at("list").replaceChildren(...visible.map((question) => item(question, data)));
  const range = last ? `${page * PAGE + 1}–${page * PAGE + visible.length} of ` : "";
  at("count").textContent = `${range}${questions.length.toLocaleString("en")} ${questions.length === 1 ? "question" : "questions"}`;
  at("order").textContent = `; correct (✓) or wrong (✗), in the order ${data.models.map((model) => models[model]).join(" · ")}`;
  at("previous").disabled = page === 0;
  at("next").disabled = page === last;
  at("single").hidden = !state.id;
}

function controls() {
  const data = load(state.benchmark);
  at("benchmark").value = state.benchmark;
  options(at("show"), filters(data), state.show);
  options(at("category"), [["", "all"], ...data.categories.map((name, i) => [String(i), name])], state.category);
  at("search").value = state.search;
}

function change(changes) {
  state = { ...state, page: "0", id: "", ...changes };
  const changed = Object.entries(state).filter(([key, value]) => value !== START[key]);
  history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
  render();
}

function readUrl() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = Object.fromEntries(Object.entries(START).map(([key, start]) => [key, given.get(key) ?? start]));
  if (!at(`questions-${state.benchmark}`)) state.benchmark = START.benchmark;
  controls();
  render();
  if (state.id) at("questions-title").scrollIntoView();
}

function sort(table, column, direction) {
  const sign = direction === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // missing values come last
    return sign * (column === 0 ? x.localeCompare(y) : Number(x) - Number(y));
  });
  table.tBodies[0].append(...rows);
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    if (i === column) cell.setAttribute("aria-sort", direction);
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
// The URL may also name an element of the page, which leaves the view as it is.
addEventListener("hashchange", () => { if (!at(location.hash.slice(1))) readUrl(); });
readUrl();
