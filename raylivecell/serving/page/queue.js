// Requests for cells: a few at a time, the shown image first, again after other thresholds.
import {Picture} from "./images.js";
import * as service from "./service.js";

const REQUESTS = 3; // at the same time

export class Queue {
  /**
   * @param {Picture[]} pictures  all images; the other planes of a file are added after its first one
   * @param {Map} options  query of /segment that the person has set
   * @param {object} on  current(): the shown picture; changed(picture): it has cells or an error; progress(): anything
   *   changed; refused(error): a request that can succeed later failed, no further ones are sent until `resume`
   */
  constructor(pictures, options, on) {
    Object.assign(this, {pictures, options, on, isPaused: true});
  }

  /** Whether a picture's cells are missing, or those of other options; those that a person has approved stay. */
  isOutdated(picture) {
    return picture.options !== this._key() && !picture.fixed;
  }

  resume() {
    this.isPaused = false;
    this.fill();
  }

  /** Stop requests whose options are not those of now, and send others. */
  restart() {
    this.pictures.forEach((picture) => picture.busy?.abort());
    this.fill();
  }

  /** Send requests: for the shown image first, then for new ones, then for those with other options. */
  fill() {
    if (!this.isPaused) {
      const busy = this.pictures.filter((picture) => picture.busy).length;
      const waiting = this.pictures.filter((picture) => this.isOutdated(picture) && !picture.busy);
      waiting.sort((a, b) => this._rank(a) - this._rank(b));
      waiting.slice(0, Math.max(REQUESTS - busy, 0)).forEach((picture) => this._segment(picture));
    }
    this.on.progress();
  }

  _key() {
    return JSON.stringify(Object.fromEntries(this.options));
  }

  _rank(picture) {
    return picture === this.on.current() ? 0 : picture.options === null ? 1 : 2;
  }

  async _segment(picture) {
    const key = this._key(), isNew = picture.options === null && !picture.plane;
    picture.busy = new AbortController();
    try {
      const query = {...JSON.parse(key), ...this._plane(picture)};
      const answer = await service.segment(picture.file, query, picture.busy.signal);
      if (!picture.fixed) picture.receive(answer, key);
      if (isNew) this._addPlanes(picture, answer.planes);
    } catch (error) {
      if (error.isTemporary) this.on.refused(error);
      else if (error.name !== "AbortError") this._fail(picture, error, key, isNew);
    } finally {
      picture.busy = null;
    }
    await this.on.changed(picture);
    this.fill();
  }

  _fail(picture, error, key, isNew) {
    Object.assign(picture, {state: "failed", error: error.message, options: key});
    const planes = error.planes ?? [];
    if (isNew && planes.length > 1) picture.plane = planes[0];
    if (isNew) this._addPlanes(picture, planes);
  }

  /** The plane to ask for: the first of a new file; without its channel if the person has chosen one. */
  _plane(picture) {
    const hasChannel = this.options.has("channel");
    const plane = hasChannel ? picture.plane.replace(/_?c\d+/, "").replace(/^_/, "") : picture.plane;
    return plane ? {plane} : picture.options === null || !picture.plane ? {plane: "0"} : {};
  }

  _addPlanes(picture, planes) {
    const index = this.pictures.indexOf(picture);
    if (index < 0) return; // removed meanwhile
    const others = planes.filter((plane) => plane !== picture.plane);
    const added = others.map((plane) => new Picture(picture.path, picture.file, plane));
    this.pictures.splice(index + 1, 0, ...added);
  }
}
