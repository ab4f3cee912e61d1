/**
 * Loads the modules of the page. Opened from disk, where browsers refuse to import neighbouring files, the page takes them
 * from the node whose address is typed in, or given by `imstream up`. A classic script, which browsers load from disk.
 */
"use strict";

const MAX_RELOADS = 20;
const RELOAD_AFTER = 500; // ms

const form = document.getElementById("enter");
const given = new URLSearchParams(location.hash.slice(1));
const noAnswer = document.getElementById("no-answer");

/** Shows the fixed texts of the page in a language: English stands in the document, Chinese beside it. */
function speak(lang) {
  document.documentElement.lang = lang === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-zh]")) {
    element.dataset.en ??= element.textContent;
    element.textContent = element.dataset[lang];
  }
  for (const element of document.querySelectorAll("[data-label-zh]")) {
    element.dataset.labelEn ??= element.getAttribute("aria-label");
    element.title = lang === "zh" ? element.dataset.labelZh : element.dataset.labelEn;
    element.setAttribute("aria-label", element.title);
  }
}

/** Imports the modules that belong to this page and its styles: their addresses have the same version. */
async function loadOwn() {
  const { href, sheet } = document.querySelector("link[rel=stylesheet]");
  if (!sheet?.cssRules.length) throw new Error("no styles of this version"); // Chromium has an empty sheet then
  await import(`./page.js${new URL(href).search}`);
  history.replaceState(null, "");
}

/** While a new release is installed, other nodes have other versions. Loads the page of another one, with a limit. */
function loadAgain() {
  const tries = history.state?.tries ?? 0;
  history.replaceState({ tries: tries + 1 }, "");
  if (tries < MAX_RELOADS) setTimeout(() => location.reload(), RELOAD_AFTER);
}

/** Imports the modules from the node at an address. */
function load(address) {
  const url = new URL(address.includes("://") ? address : `http://${address}`).href;
  return import(`${url.replace(/\/*$/, "/")}page.js`);
}

/** Values stored by page.js: in this tab, or in this browser. */
function stored(name, kind = "sessionStorage") {
  try {
    return JSON.parse(window[kind].getItem(`imstream.${name}`));
  } catch {
    return null; // forbidden
  }
}

const FROM_DISK = location.protocol === "file:";
const { address: addressField } = form.elements;

form.onsubmit = async (event) => {
  event.preventDefault();
  try {
    await (FROM_DISK ? load(addressField.value.trim()) : loading);
    form.dispatchEvent(new Event("submit", { cancelable: true })); // the modules have replaced this handler
  } catch {
    noAnswer.hidden = false;
  }
};
if (FROM_DISK) {
  speak(navigator.language.startsWith("zh") ? "zh" : "en");
  document.getElementById("elsewhere").open = true;
  addressField.value = 
    given.get("node") ?? stored("address") ?? stored("address", "localStorage") ?? addressField.placeholder;
  addEventListener("hashchange", () => location.reload()); // the URL of another run was pasted
}
const loading = FROM_DISK ? undefined : loadOwn();
loading?.catch(loadAgain);
if (FROM_DISK && (given.has("node") || stored("user"))) load(addressField.value).catch(() => {}); // the button tries again
