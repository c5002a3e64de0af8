// Calls a function of docs/assets/browser/reading.js: node reading.mjs < {"call": name, ...} > result.
import { readFileSync, writeFileSync } from 'node:fs';
import * as reading from '../../docs/assets/browser/reading.js';

const { call, file, sides, ...given } = JSON.parse(readFileSync(0, 'utf-8'));
const results = {
  sizes: () => given.sides.map(([height, width]) => reading.resizedSize(height, width, given.size)),
  pixels: () => {
    const image = { data: readFileSync(file), width: given.width, height: given.height };
    const small = reading.resize(image, ...given.to);
    writeFileSync(given.bytes, small.data);
    writeFileSync(given.values, Buffer.from(reading.normalise(small, given.processor).buffer));
  },
  objects: () => {
    const found = reading.candidates(
      Float32Array.from(given.logits), Float32Array.from(given.boxes), given.names.length, given.size,
    );
    return reading.select(found, given.config, given.names);
  },
};
if (sides) given.sides = sides;
console.log(JSON.stringify(results[call]() ?? null));
