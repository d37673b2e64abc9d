// Files: dropped folders, bytes, and the zip of a download.

/** Files of a drop or a file dialog as [{path, file}]; folders are read with everything in them. */
export async function readDrop(transfer) {
  const entries = [...transfer.items].filter((item) => item.kind === "file")
    .map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
  return (await Promise.all(entries.filter(Boolean).map((entry) => readEntry(entry, "")))).flat();
}

/** Files of an <input type="file">. */
export const readInput = (input) => [...input.files].map((file) => ({path: file.webkitRelativePath || file.name, file}));

async function readEntry(entry, folder) {
  if (entry instanceof File) return [{path: folder + entry.name, file: entry}];
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{path: folder + entry.name, file}];
  }
  const reader = entry.createReader(), children = [];
  for (;;) { // a reader returns at most 100 entries at a time
    const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!batch.length) break;
    children.push(...batch);
  }
  return (await Promise.all(children.map((child) => readEntry(child, `${folder}${entry.name}/`)))).flat();
}

export function fromBase64(text) {
  const binary = atob(text);
  return Uint8Array.from(binary, (character) => character.charCodeAt(0));
}

export async function toBase64(blob) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  return url.slice(url.indexOf(",") + 1);
}

export const int32FromBase64 = (text) => new Int32Array(fromBase64(text).buffer);

const CRC = Uint32Array.from({length: 256}, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

const MAX_ZIP = 2 ** 32 - 1; // bytes, without the extension Zip64
const MAX_FILES = 2 ** 16 - 1;

/** A name as file systems compare it that ignore case or the form of accents. */
const folded = (name) => name.normalize("NFC").toLowerCase();

/** A zip without compression (images are compressed already), of files added one by one. */
export class Zip {
  constructor() {
    this.parts = [];
    this.directory = [];
    this.size = 0;
    this.names = new Set();
  }

  /** Add a file: text, bytes or a Blob. */
  async add(name, content) {
    const bytes = content instanceof Blob ? new Uint8Array(await content.arrayBuffer())
      : typeof content === "string" ? new TextEncoder().encode(content) : content;
    const path = new TextEncoder().encode(name);
    if (this.size + bytes.length > MAX_ZIP - 2 ** 24 || this.directory.length / 2 >= MAX_FILES) {
      throw new Error("more than 4 GB, or 65,535 files, in one download: use fewer images, or raylivecell predict");
    }
    const common = [20, 0x800, 0, 0, 0x21, crc32(bytes), bytes.length, bytes.length, path.length, 0];
    const sizes = [2, 2, 2, 2, 2, 4, 4, 4, 2, 2];
    const at = this.size;
    this._push(record([0x04034b50, ...common], [4, ...sizes]), path, bytes);
    this.directory.push(record([0x02014b50, 20, ...common, 0, 0, 0, 0, at], [4, 2, ...sizes, 2, 2, 2, 4, 4]), path);
    this.names.add(folded(name));
  }

  /** A name that no file of the zip has yet, in any case: `base` with a number if needed, then `suffix`. */
  unused(folder, base, suffix) {
    let name = base;
    for (let number = 2; this.names.has(folded(`${folder}${name}${suffix}`)); number++) name = `${base}_${number}`;
    return name;
  }

  blob() {
    const start = this.size, count = this.directory.length / 2;
    const length = this.directory.reduce((total, part) => total + part.length, 0);
    const end = record([0x06054b50, 0, 0, count, count, length, start, 0], [4, 2, 2, 2, 2, 4, 4, 2]);
    return new Blob([...this.parts, ...this.directory, end], {type: "application/zip"});
  }

  _push(...parts) {
    for (const part of parts) {
      this.parts.push(part);
      this.size += part.length;
    }
  }
}

/** Little-endian bytes of numbers. */
function record(values, sizes) {
  const bytes = new Uint8Array(sizes.reduce((a, b) => a + b, 0));
  let at = 0;
  values.forEach((value, i) => {
    for (let k = 0; k < sizes[i]; k++) bytes[at++] = Math.floor(value / 256 ** k) & 255;
  });
  return bytes;
}

/** Let the browser save a Blob. */
export function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

/** A line of a CSV table. */
export const csvLine = (fields) =>
  `${fields.map((field) => (/[",\n]/.test(field) ? `"${String(field).replaceAll('"', '""')}"` : field)).join(",")}\n`;
