// Label images to compare with: found by folder and name, or chosen for one image.
import {fromRuns} from "./labels.js";
import {toBase64} from "./files.js";
import {pageData} from "./service.js";

// As `raylivecell prepare` pairs images with labels (data/pairing.py).
const LABEL_FOLDER = /^(masks?|labels?|annotations?|gt|groundtruth|seg|segmentations?)$/;
const IMAGE_FOLDER = /^(images?|imgs?|raw)$/;
const NAME_SUFFIX = /[_-](cp[_-]masks?|masks?|labels?|seg|gt)$/;
const FILE_SUFFIX = /\.(tiff?|png|npy)$/;
const WAIT_MS = 400; // after a correction, before the scores are computed again

/** Folder and name that an image and its labels have in common. */
function pairKey(path) {
  const parts = path.toLowerCase().split("/").filter((part) => !LABEL_FOLDER.test(part) && !IMAGE_FOLDER.test(part));
  const name = (parts.pop() ?? "").replace(/(\.ome)?\.[^.]*$/, "").replace(NAME_SUFFIX, "");
  return [...parts, name].join("/");
}

function isLabels(path) {
  const parts = path.toLowerCase().split("/"), name = parts.pop();
  const stem = name.replace(/\.[^.]*$/, "");
  return FILE_SUFFIX.test(name) && (parts.some((part) => LABEL_FOLDER.test(part)) || NAME_SUFFIX.test(stem));
}

export class References {
  constructor(changed, fail) {
    this.changed = changed;
    this.fail = fail;
    this.files = new Map(); // pairKey -> file
    this.paths = new Set();
  }

  /** Keep the label images of a drop; returns the other files. */
  take(listed) {
    return listed.filter((item) => {
      if (!isLabels(item.path)) return true;
      this.files.set(pairKey(item.path), item.file);
      this.paths.add(item.path);
      return false;
    });
  }

  has(item) {
    return this.paths.has(item.path);
  }

  /** Compare each picture without a reference with its label image; returns whether there was any. */
  assign(pictures) {
    const matched = pictures.filter((picture) => !picture.plane && !picture.reference && picture.state === "ready" &&
      this.files.has(pairKey(picture.path)));
    matched.forEach((picture) => this.set(picture, this.files.get(pairKey(picture.path))));
    return pictures.some((picture) => this.files.has(pairKey(picture.path)));
  }

  /** Compare a picture with a label image. */
  async set(picture, file) {
    picture.reference = {file: file.name, source: file, labels: null, scores: null};
    await this._score(picture);
  }

  /** Compute the scores again, after a correction or with other thresholds. */
  scoreSoon(picture) {
    if (!picture?.reference) return;
    clearTimeout(picture.timer);
    picture.timer = setTimeout(() => this._score(picture), WAIT_MS);
  }

  async _score(picture) {
    const {reference} = picture;
    this.changed();
    try {
      const answer = await pageData("score", {...picture.runs(), reference: await toBase64(reference.source)});
      if (picture.reference?.source !== reference.source) return;
      const {width, height} = picture.labels;
      picture.reference = {...reference, labels: fromRuns(width, height, answer.label_runs), scores: answer.scores};
    } catch (error) {
      picture.reference = null;
      this.fail(`${reference.file}: ${error.message}`);
    }
    this.changed();
  }
}
