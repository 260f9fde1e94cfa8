// Requests to the service, and messages for failed ones.

const KEY = "crossx-api-key";
const MAX_WAIT = 60;  // seconds to wait for a full queue
const WORDS = {
  413: "The picture is too large for the service.",
  429: "The service is busy. Try again in a moment.",
  503: "The service is stopping. Try again later.",
};

export class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

export const describe = (options) => ask("model", options);

export async function predict(picture, options) {
  const { predictions: [prediction] } = await ask("predict?top=5", { picture, ...options });
  if (prediction.error) throw new Failure(`${picture.name} ${ended(prediction.error)}`, 422);
  return prediction;
}

export function explain(picture, target, options) {
  const query = new URLSearchParams({ format: "json" });
  if (target !== null) {
    query.set("maps", "class");
    query.set("target", target);
  }
  return ask(`explain?${query}`, { picture, ...options });
}

// If the queue is full, try once more after Retry-After; `onWait` gets the seconds.
async function ask(path, { picture, signal, onWait } = {}, again = true) {
  const response = await send(path, picture, signal);
  if (response.status === 429 && again) {
    const seconds = Number(response.headers.get("Retry-After")) || 1;
    if (seconds <= MAX_WAIT) {
      onWait?.(seconds);
      await pause(1000 * seconds, signal);
      return ask(path, { picture, signal, onWait }, false);
    }
  }
  const content = await response.json().catch(() => null);
  // the prediction of an unreadable image has the reason
  if (content && (response.ok || content.predictions)) return content;
  throw new Failure(reason(response.status, content?.detail), response.status);
}

async function send(path, picture, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = key === null ? {} : { "X-API-Key": key };
  const body = picture && new FormData();
  body?.append("images", picture, picture.name);
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body, signal });
  } catch {
    signal?.throwIfAborted();
    throw new Failure("The service cannot be reached. Check that it is running, and your network connection.");
  }
}

function reason(status, detail) {
  if (status === 401) return sessionStorage.getItem(KEY) === null ? "" : "This API key is not valid.";
  if (status in WORDS) return WORDS[status];
  return detail ? ended(detail[0].toUpperCase() + detail.slice(1)) : `The service's response cannot be read (status ${status}).`;
}

const ended = (text) => `${text.replace(/\.$/, "")}.`;

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
