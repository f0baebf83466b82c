// The search page. Everything that comes from the server or the user enters the document as text, never as markup.

const PAGE_SIZE = 12;
const MAX_RESULTS = 96;
const COUNT_DELAY_MS = 150;

const $ = (id) => document.getElementById(id);
const composer = $("composer");
const query = $("query");
const results = $("results");

let current = null; // the search whose results are shown: {query, truncate, topK}
let image = null; // the data URI of the image to search by
let searching = null; // AbortController of the search under way
let counting = null; // AbortController of the count under way
let countTimer = 0;

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  const body = await response.json().catch(() => null);
  if (response.ok) return body;
  const { message = `The server answered ${response.status}.`, code, param } = body?.error ?? {};
  // The address of the field in the request means nothing to a reader of the page.
  throw Object.assign(new Error(sentence(message.replace(`${param}: `, ""))), { code });
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function post(path, body, signal) {
  return call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
}

// ---- searching

async function search(request, { remember = true } = {}) {
  searching?.abort();
  const controller = (searching = new AbortController());
  if (remember) rememberInAddress(request.query);
  hideError();
  setBusy(true);
  $("status").textContent = "Searching…";
  try {
    const answer = await post(
      "v1/search",
      { query: request.query, top_k: request.topK ?? PAGE_SIZE, truncate: request.truncate ?? false },
      controller.signal,
    );
    current = request;
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
  const cut = answer.truncated ? `, of which the first ${answer.tokens} tokens were read` : "";
  const count = answer.hits.length === 1 ? "1 picture" : `${answer.hits.length} pictures`;
  $("status").textContent = answer.hits.length
    ? `${count} nearest to ${kind}${cut} · ${Math.max(1, Math.round(answer.took_ms))} ms`
    : "The index has no pictures.";
}

function card(hit, position) {
  const item = $("card").content.firstElementChild.cloneNode(true);
  const picture = item.querySelector("img");
  picture.src = hit.thumbnail_url;
  picture.alt = hit.caption.slice(0, 160);
  item.dataset.id = hit.id;
  item.querySelector(".rank").textContent = `#${position + 1}`;
  item.querySelector(".score").textContent = hit.score.toFixed(3);
  item.querySelector(".score").title = "Cosine similarity";
  item.querySelector(".caption").textContent = hit.caption;
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
  await search({ ...current, topK: Math.min(MAX_RESULTS, shown + PAGE_SIZE) }, { remember: false });
  results.children[shown]?.querySelector("button:not([hidden])")?.focus(); // the button that was pressed may be gone
}

// ---- errors

function showError(error, request) {
  const tooLong = error.code === "context_length_exceeded";
  $("error-text").textContent = tooLong ? "This description is longer than the model reads." : error.message;
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
    showError(new Error("That is not an image."));
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

// ---- the address: ?q=text and ?like=id; an image is too large for one

function rememberInAddress(searched) {
  const parameters = new URLSearchParams();
  if (searched.text) parameters.set("q", searched.text);
  if (searched.id !== undefined) parameters.set("like", searched.id);
  const address = parameters.size ? `?${parameters}` : location.pathname;
  if (address !== (location.search || location.pathname)) history.pushState(null, "", address);
}

function searchFromAddress() {
  const parameters = new URLSearchParams(location.search);
  removeImage();
  query.value = parameters.get("q") ?? "";
  countTokens();
  if (parameters.has("like")) return search({ query: { id: parameters.get("like") } }, { remember: false });
  if (query.value.trim()) return search({ query: { text: query.value.trim() } }, { remember: false });
  searching?.abort();
  setBusy(false);
  hideError();
  results.replaceChildren();
  $("more").hidden = true;
  $("status").textContent = "";
}

// ---- what the server says of itself

async function showInfo() {
  const { model, index } = await call("info");
  const facts = [`Model ${model.id}`, `version ${model.version}`];
  facts.push(index ? `${index.count.toLocaleString("en")} pictures indexed` : "no index loaded");
  $("footer").replaceChildren(...facts.map(textElement("span")));
  if (!index) {
    showError(new Error("This server has no index to search. Start it with index=DIRECTORY."));
    $("search").disabled = true;
  }
}

async function showExamples() {
  const { examples } = await call("v1/examples");
  const buttons = examples.map(textElement("button"));
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

const textElement = (tag) => (text) => Object.assign(document.createElement(tag), { textContent: text });

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
  $("file").value = ""; // choosing the same file again is a change, too
});
$("remove-image").addEventListener("click", () => {
  removeImage();
  query.focus();
});
$("more").addEventListener("click", showMore);
addEventListener("popstate", searchFromAddress);
addEventListener("paste", (event) => {
  const file = imageOf(event.clipboardData);
  if (!file) return;
  event.preventDefault();
  useImage(file);
});
addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return; // text may be dropped into the box as anywhere
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

searchFromAddress();
showExamples().catch(() => {}); // the page works without them
showInfo().catch(showError);
