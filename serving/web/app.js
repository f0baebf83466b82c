// The search page. Text from the server or the user is inserted as text, never as markup.

import { $, call, element, listItem, post, showPicture } from "./server.js";

const PAGE_SIZE = 12;
const MAX_RESULTS = 96;
const COUNT_DELAY_MS = 150;

const composer = $("composer");
const query = $("query");
const results = $("results");

let current = null; // the search whose results are displayed: {query, truncate, topK}
let conditions = []; // active filters: {field, operator, value}
let columns = {}; // columns that filters can use: {name: type}
let image = null; // data URI of the query image
let searching = null; // AbortController of the pending search
let counting = null; // AbortController of the pending token count
let countTimer = 0;

// ---- searching

async function search(request, { updatesUrl = true } = {}) {
  searching?.abort();
  const controller = (searching = new AbortController());
  current = request;
  if (updatesUrl) updateUrl(request.query);
  hideError();
  setBusy(true);
  $("status").textContent = "Searching…";
  try {
    const answer = await post(
      "v1/search",
      {
        query: request.query,
        top_k: request.topK ?? PAGE_SIZE,
        truncate: request.truncate ?? false,
        target: $("target").value,
        filter: filter(),
      },
      controller.signal,
    );
    showResults(answer, request);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("status").textContent = "";
    results.replaceChildren();
    $("more").hidden = true;
    showError(error, request);
  } finally {
    if (searching === controller) setBusy(false);
  }
}

function searchComposer() {
  if (image) return search({ query: { image } });
  const text = query.value.trim();
  if (text) return search({ query: { text } });
  query.focus();
}

function searchLike(id) {
  removeImage();
  query.value = "";
  countTokens();
  scrollTo({ top: 0 });
  return search({ query: { id } });
}

function setBusy(busy) {
  results.setAttribute("aria-busy", busy);
  $("search").setAttribute("aria-busy", busy);
}

// ---- results

function showResults(answer, request) {
  results.replaceChildren(...answer.hits.map(card));
  for (const item of results.children) {
    const caption = item.querySelector(".caption");
    item.querySelector(".expand").hidden = caption.scrollHeight <= caption.clientHeight + 1;
  }
  const topK = request.topK ?? PAGE_SIZE;
  $("more").hidden = answer.hits.length < topK || topK >= MAX_RESULTS;
  const kind = request.query.image ? "your image" : request.query.id !== undefined ? `“${request.query.id}”` : "your description";
  const cut = answer.truncated ? `; only its first ${answer.tokens} tokens were used` : "";
  const count = answer.hits.length === 1 ? "1 picture" : `${answer.hits.length} pictures`;
  const none = conditions.length ? "No pictures match the filters." : "The index has no pictures.";
  $("status").textContent = answer.hits.length
    ? `${count} nearest to ${kind}${cut} · ${Math.max(1, Math.round(answer.took_ms))} ms`
    : none;
}

function card(hit, position) {
  const item = $("card").content.firstElementChild.cloneNode(true);
  const picture = item.querySelector("img");
  showPicture(picture, hit.thumbnail_url).catch(() => {}); // show the caption without the image
  picture.alt = hit.caption.slice(0, 160);
  item.dataset.id = hit.id;
  item.querySelector(".rank").textContent = `#${position + 1}`;
  item.querySelector(".score").textContent = hit.score.toFixed(3);
  item.querySelector(".score").title = "Cosine similarity";
  item.querySelector(".caption").textContent = hit.caption;
  item.querySelector(".tags").replaceChildren(
    ...Object.entries(hit.metadata)
      .filter(([, value]) => value !== null)
      .map(([field, value]) => {
        const tag = element("button", `${field}: ${value}`, { type: "button", className: "quiet" });
        tag.setAttribute("aria-label", `Only ${field} ${value}`);
        tag.addEventListener("click", () => addCondition({ field, operator: "eq", value }));
        return listItem(tag);
      }),
  );
  const like = item.querySelector(".like");
  like.setAttribute("aria-label", `More like picture ${position + 1}`);
  like.addEventListener("click", () => searchLike(hit.id));
  const expand = item.querySelector(".expand");
  expand.addEventListener("click", () => {
    const open = item.classList.toggle("open");
    expand.setAttribute("aria-expanded", open);
    expand.textContent = open ? "Read less" : "Read all";
  });
  return item;
}

async function showMore() {
  const shown = results.children.length;
  await search({ ...current, topK: Math.min(MAX_RESULTS, shown + PAGE_SIZE) }, { updatesUrl: false });
  results.children[shown]?.querySelector("button:not([hidden])")?.focus(); // the pressed button may be hidden now
}

// ---- errors

function showError(error, request) {
  const tooLong = error.code === "context_length_exceeded";
  $("error-text").textContent = tooLong ? "This description is longer than the model can read." : error.message;
  $("truncate").hidden = !tooLong;
  $("truncate").onclick = () => search({ ...request, truncate: true });
  $("error").hidden = false;
}

function hideError() {
  $("error").hidden = true;
}

// ---- token counter

function countTokensSoon() {
  clearTimeout(countTimer);
  countTimer = setTimeout(countTokens, COUNT_DELAY_MS);
}

async function countTokens() {
  clearTimeout(countTimer);
  counting?.abort();
  const controller = (counting = new AbortController());
  try {
    const { tokens, context_length } = await post("v1/tokenize", { text: query.value }, controller.signal);
    const over = tokens > context_length;
    $("counter").textContent = `${tokens} / ${context_length} tokens`;
    $("counter").classList.toggle("over", over);
    $("meter").classList.toggle("over", over);
    $("meter").style.width = `${Math.min(100, (100 * tokens) / context_length)}%`;
  } catch (error) {
    if (error.name !== "AbortError") $("counter").textContent = "";
  }
}

// ---- searching by image

function useImage(file) {
  if (!file?.type.startsWith("image/")) {
    showError(new Error("This file is not an image."));
    return;
  }
  const reader = new FileReader();
  reader.addEventListener("error", () => showError(new Error("The image cannot be read.")));
  reader.addEventListener("load", () => {
    removeImage();
    image = reader.result;
    query.value = "";
    countTokens();
    $("preview").src = URL.createObjectURL(file);
    $("chip-name").textContent = file.name || "Pasted image";
    $("chip").hidden = false;
    searchComposer();
  });
  reader.readAsDataURL(file);
}

function removeImage() {
  if (!image) return;
  image = null;
  URL.revokeObjectURL($("preview").src);
  $("preview").removeAttribute("src");
  $("chip").hidden = true;
}

const imageOf = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));

// ---- filters

const SIGNS = { eq: "is", ne: "is not", lt: "<", lte: "≤", gt: ">", gte: "≥" };
const isText = (field) => columns[field] === "string";
const isFlag = (field) => columns[field] === "bool";

function filter() {
  if (!conditions.length) return null;
  return { and: conditions.map(({ field, operator, value }) => ({ [field]: { [operator]: value } })) };
}

function addCondition(condition) {
  conditions = [...conditions.filter((other) => JSON.stringify(other) !== JSON.stringify(condition)), condition];
  conditionsChanged();
}

function conditionsChanged() {
  showConditions();
  if (current) search({ ...current, topK: PAGE_SIZE });
}

function showConditions() {
  $("conditions").replaceChildren(
    ...conditions.map((condition) => {
      const text = `${condition.field} ${SIGNS[condition.operator]} ${condition.value}`;
      const button = element("button", `${text} ✕`, { type: "button", className: "quiet" });
      button.setAttribute("aria-label", `Remove the filter ${text}`);
      button.addEventListener("click", () => {
        conditions = conditions.filter((other) => other !== condition);
        conditionsChanged();
        query.focus();
      });
      return listItem(button);
    }),
  );
}

function showOperators() {
  const field = $("field").value;
  const possible = isText(field) || isFlag(field) ? ["eq", "ne"] : Object.keys(SIGNS);
  $("operator").replaceChildren(...possible.map((name) => element("option", SIGNS[name], { value: name })));
  $("value").type = isText(field) || isFlag(field) ? "text" : "number";
  $("value").step = "any";
  $("value").placeholder = isFlag(field) ? "true or false" : "";
  $("value").pattern = isFlag(field) ? "true|false" : ".*";
}

function conditionOfForm() {
  const [field, text] = [$("field").value, $("value").value];
  const value = isFlag(field) ? text === "true" : isText(field) ? text : Number(text);
  return { field, operator: $("operator").value, value };
}

// ---- page URL: ?q=text or ?like=id, with target and filter; images are too large for a URL

function updateUrl(searchQuery) {
  const parameters = new URLSearchParams();
  if (searchQuery.text) parameters.set("q", searchQuery.text);
  if (searchQuery.id !== undefined) parameters.set("like", searchQuery.id);
  if (parameters.size && $("target").value !== "image") parameters.set("target", $("target").value);
  if (parameters.size && conditions.length) parameters.set("filter", JSON.stringify(conditions));
  const url = parameters.size ? `?${parameters}` : location.pathname;
  if (url !== (location.search || location.pathname)) history.pushState(null, "", url);
}

function searchFromUrl() {
  const parameters = new URLSearchParams(location.search);
  removeImage();
  query.value = parameters.get("q") ?? "";
  $("target").value = parameters.get("target") === "caption" ? "caption" : "image";
  conditions = conditionsOf(parameters.get("filter"));
  showConditions();
  countTokens();
  if (parameters.has("like")) return search({ query: { id: parameters.get("like") } }, { updatesUrl: false });
  if (query.value.trim()) return search({ query: { text: query.value.trim() } }, { updatesUrl: false });
  current = null;
  searching?.abort();
  setBusy(false);
  hideError();
  results.replaceChildren();
  $("more").hidden = true;
  $("status").textContent = "";
}

function conditionsOf(text) {
  try {
    const parsed = JSON.parse(text ?? "[]");
    return Array.isArray(parsed) ? parsed.filter(({ field, operator }) => typeof field === "string" && operator in SIGNS) : [];
  } catch {
    return []; // an invalid URL, edited by hand
  }
}

// ---- model, index, examples

async function showInfo() {
  const { model, index } = await call("info");
  const facts = [`Model ${model.id}`, `version ${model.version}`];
  facts.push(index ? `${index.count.toLocaleString("en")} pictures indexed` : "no index loaded");
  if (index) facts.push(`index version ${index.version}`);
  $("footer").replaceChildren(...facts.map((text) => element("span", text)));
  columns = index?.metadata ?? {};
  $("target-field").hidden = !index?.targets.includes("caption");
  $("filters").hidden = !Object.keys(columns).length;
  $("narrow").hidden = $("target-field").hidden && $("filters").hidden;
  $("field").replaceChildren(...Object.keys(columns).map((name) => element("option", name)));
  showOperators();
  if (!index) {
    showError(new Error("This server has no index to search. Start it with index=DIRECTORY."));
    $("search").disabled = true;
  }
}

async function showExamples() {
  const { examples } = await call("v1/examples");
  const buttons = examples.map((text) => element("button", text));
  for (const button of buttons) {
    button.type = "button";
    button.className = "quiet";
    button.title = button.textContent;
    button.addEventListener("click", () => {
      removeImage();
      query.value = button.textContent;
      countTokens();
      searchComposer();
    });
  }
  $("examples").replaceChildren(...buttons);
}

// ---- events

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  searchComposer();
});
query.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    composer.requestSubmit();
  }
});
query.addEventListener("input", () => {
  removeImage();
  countTokensSoon();
});
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) useImage($("file").files[0]);
  $("file").value = ""; // so that choosing the same file again triggers a change
});
$("remove-image").addEventListener("click", () => {
  removeImage();
  query.focus();
});
$("more").addEventListener("click", showMore);
$("target").addEventListener("change", conditionsChanged);
$("field").addEventListener("change", showOperators);
$("condition").addEventListener("submit", (event) => {
  event.preventDefault();
  addCondition(conditionOfForm());
  $("value").value = "";
});
addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, dialog");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    query.focus();
  }
  if (event.key === "Escape" && event.target === query) {
    query.value = "";
    removeImage();
    countTokens();
  }
});
addEventListener("popstate", searchFromUrl);
addEventListener("paste", (event) => {
  const file = imageOf(event.clipboardData);
  if (!file) return;
  event.preventDefault();
  useImage(file);
});
addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return; // dropped text is handled by the text box
  event.preventDefault();
  composer.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) composer.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  composer.classList.remove("dropping");
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  useImage(imageOf(event.dataTransfer) ?? event.dataTransfer.files[0]);
});

searchFromUrl();
showExamples().catch(() => {}); // examples are optional
showInfo().catch(showError);
