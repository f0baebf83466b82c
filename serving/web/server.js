// Requests to the server, with an API key if it requires one, and access to elements of the page.

export const $ = (id) => document.getElementById(id);

export const element = (tag, text, properties = {}) =>
  Object.assign(document.createElement(tag), { textContent: text, ...properties });

export function listItem(content) {
  const item = element("li", "");
  item.append(content);
  return item;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

export async function call(path, options = {}) {
  const response = await reach(path, options);
  const body = await response.json().catch(() => null);
  if (response.ok) return body;
  const { message = `The server responded with status ${response.status}.`, code, param } = body?.error ?? {};
  // The path of the field in the request means nothing to users of the page.
  throw Object.assign(new Error(sentence(message.replace(`${param}: `, ""))), { code });
}

async function reach(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { ...options.headers, Authorization: `Bearer ${key}` } : options.headers;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.status !== 401) return response;
  await askForKey();
  return reach(path, options);
}

// ---- API key; all requests that need one share a dialog

let asking = null;

function askForKey() {
  asking ??= new Promise((resolve) => {
    $("key").value = "";
    $("key-dialog").showModal();
    $("key-dialog").addEventListener(
      "close",
      () => {
        sessionStorage.setItem("key", $("key").value.trim());
        asking = null;
        resolve();
      },
      { once: true },
    );
  });
  return asking;
}

// An image element cannot send the key, so with a key the image is fetched here.
export async function showPicture(picture, url) {
  if (!sessionStorage.getItem("key")) {
    picture.src = url;
    return;
  }
  const response = await reach(url);
  if (!response.ok) return;
  picture.src = URL.createObjectURL(await response.blob());
  picture.addEventListener("load", () => URL.revokeObjectURL(picture.src), { once: true });
}

export function post(path, body, signal) {
  return call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
}
