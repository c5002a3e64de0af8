// Runs a pipeline of transformers.js on an image and prints what it finds, as JSON.
// node transformers_js.mjs PACKAGE TASK FOLDER IMAGE OPTIONS [DTYPE]
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [library, task, folder, image, options, dtype] = process.argv.slice(2);
const { env, pipeline } = await import(
  pathToFileURL(path.join(library, 'dist', 'transformers.node.mjs')).href
);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const settings = { device: 'cpu', ...(dtype ? { dtype } : {}) };
const run = await pipeline(task, path.basename(folder), settings);
const warnings = [];
console.warn = (...parts) => warnings.push(parts.join(' '));
let started = performance.now();
let found = await run(image, JSON.parse(options));
started = performance.now();
found = await run(image, JSON.parse(options));
const milliseconds = performance.now() - started;
for (const item of found) {
  if (item.mask) {
    // Runs of equal values, beginning with zeros.
    const runs = [];
    let value = 0, length = 0;
    for (const pixel of item.mask.data) {
      if (pixel === value) length += 1;
      else { runs.push(length); value = pixel; length = 1; }
    }
    item.mask = { width: item.mask.width, height: item.mask.height, runs: [...runs, length] };
  }
}
console.log(JSON.stringify({ version: env.version, milliseconds, found, warnings }));
