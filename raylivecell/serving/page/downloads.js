// The two downloads: everything, and the corrected images in the layout that `raylivecell prepare` reads.
import {Zip, csvLine, fromBase64} from "./files.js";
import {pageData} from "./service.js";

const IMAGE_COLUMNS = ["file", "output", "width", "height", "cells", "confluence", "mean_score", "corrected", "checked",
  "options", "warning", "error"];

/** Files of a picture in every format, and its rows of cells.csv. */
const exported = async (picture) => pageData("export", await picture.exported());

/** Folder, base name and suffix of a picture's files. */
function place(picture) {
  const slash = picture.path.lastIndexOf("/") + 1, name = picture.path.slice(slash), dot = name.lastIndexOf(".");
  const stem = dot > 0 ? name.slice(0, dot) : name;
  return {folder: picture.path.slice(0, slash), base: picture.plane ? `${stem}_${picture.plane}` : stem,
    suffix: dot > 0 ? name.slice(dot) : ""};
}

/** A zip like the folder of `raylivecell predict`: labels, overlays, geojson, rois, tables. */
export async function everything(pictures, model, growthPage, report) {
  const zip = new Zip(), images = [csvLine(IMAGE_COLUMNS)];
  let cells = "";
  for (const [number, picture] of pictures.entries()) {
    report(number, pictures.length);
    if (picture.state !== "ready") {
      images.push(csvLine(IMAGE_COLUMNS.map((column) => ({file: picture.name, error: picture.error})[column] ?? "")));
      continue;
    }
    const {folder, base} = place(picture), name = zip.unused(`labels/${folder}`, base, ".tif");
    const line = csvLine([picture.name, folder + name, picture.labels.width, picture.labels.height, picture.cells.size,
      picture.confluence.toFixed(6), picture.cells.size ? picture.meanScore.toFixed(4) : "", picture.corrected ? "yes" : "no",
      picture.checked ? "yes" : "no", picture.options, picture.warnings.join("; "), ""]);
    const answer = await exported(picture);
    for (const [pattern, data] of Object.entries(answer.files)) {
      await zip.add(pattern.replace("{}", () => folder + name), fromBase64(data));
    }
    cells = (cells || answer.columns) + answer.cells;
    images.push(line);
  }
  if (cells) await zip.add("cells.csv", cells);
  await zip.add("images.csv", images.join(""));
  await zip.add("model.json", JSON.stringify(model, null, 1));
  if (growthPage) await zip.add("growth.html", growthPage);
  return zip.blob();
}

const README = (count) => `${count} corrected image${count === 1 ? "" : "s"}: images/ with the images, masks/ with a label image for each.

Train on them, starting from the network that found these cells:

    raylivecell prepare --source THIS_FOLDER --diameter-from CHECKPOINT --out data/corrected
    raylivecell train --data data/corrected --start-from CHECKPOINT --recipe finetune --out runs/corrected
    raylivecell serve --checkpoint runs/corrected

THIS_FOLDER is the folder of this file, CHECKPOINT what \`raylivecell serve\` was started with.
`;

/** A zip of the images whose cells a person has corrected or called correct. */
export async function corrections(pictures, report) {
  const zip = new Zip();
  for (const [number, picture] of pictures.entries()) {
    report(number, pictures.length);
    const {folder, base, suffix} = place(picture), answer = await exported(picture);
    const original = suffix && !picture.plane && JSON.parse(picture.options).channel === undefined;
    // Without folders: `prepare` would take one named images or test for a role or a split.
    const name = zip.unused("masks/", (folder + base).replaceAll("/", "_"), ".tif");
    await zip.add(`images/${name}${original ? suffix : ".png"}`, original ? picture.file : picture.png);
    await zip.add(`masks/${name}.tif`, fromBase64(answer.files["labels/{}.tif"]));
  }
  await zip.add("README.txt", README(pictures.length));
  return zip.blob();
}
