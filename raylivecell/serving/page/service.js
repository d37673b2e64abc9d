// Requests to the service.

const TRIES = 6;
let token = sessionStorage.getItem("token") ?? "";

/** An answer other than 200: its status, and the line of its error. */
export class ServiceError extends Error {
  constructor(status, line, planes = []) {
    super(line);
    this.status = status;
    this.planes = planes; // all planes of the file, if they are known
  }

  /** Whether the same request can succeed later, or with a token. */
  get isTemporary() {
    return [0, 401, 429, 503].includes(this.status);
  }
}

export function useToken(value) {
  token = value.trim();
  sessionStorage.setItem("token", token);
}

const NO_ANSWER = "the service does not answer: is `raylivecell serve` still running?";

/** Facts about the network. */
export const model = () => request("model", {});

/** Cells of a plane of a file; `options` as the query of /segment. */
export const segment = (file, options, signal) =>
  request(`segment?${new URLSearchParams({view: "true", ...options})}`, {method: "POST", body: file, signal});

/** Files, scores or growth curves: see page_data.py. */
export const pageData = (task, body, signal) =>
  request(`page-data/${task}`, {method: "POST", body: JSON.stringify(body), signal});

async function request(address, options) {
  if (!/^[\x21-\x7e]*$/.test(token)) throw new ServiceError(401, "a token has letters, digits and signs without spaces");
  const headers = {...options.headers, ...(token ? {authorization: `Bearer ${token}`} : {})};
  for (let attempt = 1; ; attempt++) {
    let response;
    try {
      response = await fetch(address, {...options, headers});
    } catch (error) {
      if (error.name === "AbortError") throw error;
      await checkReadable(options.body);
      throw new ServiceError(0, NO_ANSWER);
    }
    let answer;
    try {
      answer = await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServiceError(response.ok ? 0 : response.status, response.ok ? NO_ANSWER : `status ${response.status}`);
    }
    if (response.ok) return answer;
    const wait = Number(response.headers.get("retry-after"));
    if (!wait || attempt === TRIES) throw new ServiceError(response.status, answer.error, answer.planes);
    await pause(1000 * wait * attempt, options.signal);
  }
}

/** Throw an error if a file was changed or deleted since it was dropped: the browser does not send it. */
async function checkReadable(body) {
  if (!(body instanceof Blob)) return;
  try {
    await body.slice(0, 1).arrayBuffer();
  } catch {
    throw new ServiceError(400, "this file was changed or deleted after it was added: add it again");
  }
}

/** Wait; an abort ends the wait, and then the next request. */
function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, {once: true});
  });
}
