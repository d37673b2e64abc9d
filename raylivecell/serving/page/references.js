// Label images to compare with: paired by the service as `raylivecell prepare` does, or chosen for one image.
import {fromRuns} from "./labels.js";
import {int32FromBase64, toBase64} from "./files.js";
import {pageData} from "./service.js";

const WAIT_MS = 400; // after a correction, before the scores are computed again

export class References {
  /** @param {function} changed  called when scores have changed  @param {function} fail  shows an error */
  constructor(changed, fail) {
    this.changed = changed;
    this.fail = fail;
  }

  /** Compare a picture with a label image, now or when it has its cells. */
  set(picture, file) {
    picture.reference = {name: file.name, file, labels: null, scores: null, previous: picture.reference};
    this.scoreSoon(picture, 0);
  }

  /** Compute the scores again: the picture's cells have changed. Answers to earlier requests are ignored. */
  scoreSoon(picture, wait = WAIT_MS) {
    const {reference} = picture;
    if (!reference || picture.state !== "ready") return;
    reference.scores = null;
    reference.request = (reference.request ?? 0) + 1;
    clearTimeout(reference.timer);
    reference.timer = setTimeout(() => this._score(picture, reference, reference.request), wait);
  }

  async _score(picture, reference, request) {
    const isCurrent = () => picture.reference === reference && reference.request === request;
    const {width, height} = picture.labels;
    try {
      const cells = await picture.runs();
      const answer = await pageData("score", {...cells, reference: await toBase64(reference.file)});
      if (!isCurrent()) return;
      reference.labels = fromRuns(width, height, int32FromBase64(answer.label_runs));
      reference.scores = answer.scores;
      reference.previous = null;
    } catch (error) {
      if (!isCurrent()) return;
      picture.reference = reference.previous; // the one before, if there is one
      this.fail(`${reference.name}: ${error.message}`);
    }
    this.changed(picture);
  }
}
