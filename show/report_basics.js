"use strict";
// Text, numbers and nodes. Everything that comes from the run goes through make() or draw(), which
// know text nodes and attributes only: nothing is ever parsed as HTML.

const R = JSON.parse(document.getElementById("data").textContent);
const state = { target: 0, look: -1 };

function $(id) {
  return document.getElementById(id);
}

// --- text ---------------------------------------------------------------------

// control characters, and marks that turn the direction of writing
const CONTROL =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;

// The text with such characters as signs that one can see, and lone surrogates as U+FFFD.
function visible(text) {
  return text.toWellFormed().replace(CONTROL, sign);
}

function sign(character) {
  const code = character.charCodeAt(0);
  if (code < 32) return String.fromCharCode(0x2400 + code);
  if (code === 127) return "\u2421";
  return `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
}

function plural(n, one) {
  return `${whole(n)} ${one}${n === 1 ? "" : "s"}`;
}

// --- nodes --------------------------------------------------------------------

// Gives a node attributes, listeners (on...) and children: texts and nodes. false and null are no
// attribute and no child.
function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  for (const child of children.flat()) {
    if (child) node.append(typeof child === "string" ? visible(child) : child);
  }
  return node;
}

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

// A name from the run: its direction of writing does not reach its neighbours.
function name(text) {
  return make("bdi", {}, text);
}

// --- numbers --------------------------------------------------------------------

const NONE = "\u2013";

function minus(text) {
  return text.replace("-", "\u2212");
}

function number(x, digits = 3) {
  if (x == null) return NONE;
  return minus(x.toLocaleString("en", { maximumSignificantDigits: digits }));
}

function whole(x) {
  return Math.round(x).toLocaleString("en");
}

function plus(x) {
  return x > 0 ? "+" : "";
}

// An amount in nats that is large: a loss, a drop, a sum over many chunks.
function nats(x) {
  if (x == null) return NONE;
  const digits = Math.abs(x) < 1e-4 && x !== 0 ? { maximumSignificantDigits: 2 } : FOUR;
  return minus(x.toLocaleString("en", digits));
}
const FOUR = { minimumFractionDigits: 4, maximumFractionDigits: 4 };
const ONE = { minimumFractionDigits: 1, maximumFractionDigits: 1 };

function signedNats(x) {
  return x == null ? NONE : plus(x) + nats(x);
}

// A value of a chunk, a document or a token, in nats -> its text in 1e-6 nats, as the terminal has
// it.
function micro(x) {
  return x == null ? NONE : plus(x) + size(x);
}

// The same without a plus: for errors.
function size(x) {
  if (x == null) return NONE;
  const millionths = 1e6 * x;
  const large = Math.abs(millionths) >= 1;
  if (millionths === 0 || large) return minus(millionths.toLocaleString("en", ONE));
  if (Math.abs(millionths) < 1e-4) return minus(millionths.toExponential(1));
  return number(millionths, 2);
}

// A tick of an axis whose values are in 1e-6 nats already.
function tick(millionths) {
  return minus(millionths.toLocaleString("en", { maximumSignificantDigits: 6 }));
}

// A tick with little room: 10K for 10,000.
function compact(millionths) {
  const text = millionths.toLocaleString("en", {
    notation: "compact",
    maximumSignificantDigits: 2,
  });
  return plus(millionths) + minus(text);
}

function percent(x) {
  if (x == null) return NONE;
  const decimals = Math.abs(x) < 0.0995 && x !== 0 ? 1 : 0;
  const text = (100 * x).toFixed(decimals);
  return Number(text) === 0 ? `${text.replace("-", "")}%` : `${minus(text)}%`;
}

function large(n) {
  if (n >= 1e9) return `${number(n / 1e9)} billion`;
  return n >= 1e6 ? `${number(n / 1e6)} million` : whole(n);
}

function sum(list) {
  return list.reduce((a, b) => a + b, 0);
}

// The range of a list's numbers and of 0.
function extent(list) {
  let [low, high] = [0, 0];
  for (const x of list) {
    if (x == null) continue;
    low = Math.min(low, x);
    high = Math.max(high, x);
  }
  return [low, high];
}

// --- colours --------------------------------------------------------------------

// Which way a median points. It is grey where its error is not known or it is within two of 0.
function side(median, error) {
  if (error == null || Math.abs(median) <= 2 * error) return "even";
  return median < 0 ? "hurt" : "help";
}

// A colour from -5 to 5; the root lets small values be seen.
function level(x, largest) {
  const n = largest > 0 ? Math.round(5 * Math.sqrt(Math.abs(x) / largest)) : 0;
  if (n === 0) return "";
  return x < 0 ? `v-${n}` : `v${n}`;
}
