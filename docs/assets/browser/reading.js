// From an image's pixels to the model's input, and from its outputs to objects, as detrkit does it.
//
// Nothing here knows of a page: the functions take and give arrays and plain objects.

/** Size [height, width] of an image resized by its edges, as the original of DETR computes it. */
export function resizedSize(height, width, size) {
  const short = Math.min(height, width);
  const long = Math.max(height, width);
  const { shortest_edge: shortest, longest_edge: longest } = size;
  let newShort = shortest;
  if (longest !== undefined && (long / short) * shortest > longest) {
    newShort = roundHalfToEven((longest * short) / long);
  }
  let newLong = Math.floor((newShort * long) / short);
  if (newShort < 1) {
    [newShort, newLong] = [1, longest ?? long];
  }
  return height <= width ? [newShort, newLong] : [newLong, newShort];
}

function roundHalfToEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest === 0.5) return below % 2 === 0 ? below : below + 1;
  return Math.round(value);
}

/**
 * Resizes an image with an antialiasing bilinear filter: columns first, then rows, bytes after each, as Pillow.
 *
 * @param {{data: Uint8ClampedArray, width: number, height: number}} image RGBA, as a canvas gives it.
 * @returns {{data: Uint8ClampedArray, width: number, height: number}} RGB, three bytes a pixel.
 */
export function resize(image, height, width) {
  const rgb = new Uint8ClampedArray(image.width * image.height * 3);
  for (let from = 0, to = 0; from < image.data.length; from += 4, to += 3) {
    rgb[to] = image.data[from];
    rgb[to + 1] = image.data[from + 1];
    rgb[to + 2] = image.data[from + 2];
  }
  let pixels = rgb;
  if (width !== image.width) {
    pixels = resample(pixels, image.height, 3, image.width, width, 1);
  }
  if (height !== image.height) {
    pixels = resample(pixels, 1, width * 3, image.height, height, width * 3);
  }
  return { data: pixels, width, height };
}

/**
 * Resamples one axis of bytes (outer, length, inner) to (outer, newLength, inner).
 * A step along the axis is `inner` bytes; `outer` lines follow each other.
 */
function resample(pixels, outer, inner, length, newLength) {
  const taps = triangle(length, newLength);
  const result = new Uint8ClampedArray(outer * newLength * inner);
  for (let line = 0; line < outer; line += 1) {
    const from = line * length * inner;
    const to = line * newLength * inner;
    for (let place = 0; place < newLength; place += 1) {
      const { first, weights } = taps[place];
      const source = from + first * inner;
      const target = to + place * inner;
      for (let byte = 0; byte < inner; byte += 1) {
        let sum = ONE / 2; // to round
        for (let tap = 0; tap < weights.length; tap += 1) {
          sum += weights[tap] * pixels[source + tap * inner + byte];
        }
        result[target + byte] = sum / ONE | 0;
      }
    }
  }
  return result;
}

// Weights are whole numbers of this fraction, as Pillow's are: many sums are halves but for their rounding.
const ONE = 2 ** 22;

/** For each new place the first old one that counts, and the weights of it and those behind it. */
function triangle(length, newLength) {
  const scale = length / newLength;
  const reach = Math.max(scale, 1);
  return Array.from({ length: newLength }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - reach + 0.5));
    const last = Math.min(length, Math.floor(centre + reach + 0.5));
    const weights = [];
    for (let old = first; old < last; old += 1) {
      weights.push(Math.max(0, 1 - Math.abs((old + 0.5 - centre) / reach)));
    }
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { first, weights: weights.map((weight) => Math.round((weight / sum) * ONE)) };
  });
}

/** RGB bytes as the model's input (3, height, width), rescaled and normalised. */
export function normalise({ data, width, height }, processor) {
  const { image_mean: mean, image_std: std, rescale_factor: factor } = processor;
  const area = width * height;
  const planes = new Float32Array(3 * area);
  for (let channel = 0; channel < 3; channel += 1) {
    const scale = factor / std[channel];
    const bias = -mean[channel] / std[channel];
    for (let pixel = 0; pixel < area; pixel += 1) {
      planes[channel * area + pixel] = data[pixel * 3 + channel] * scale + bias;
    }
  }
  return planes;
}

/**
 * The best pairs of query and class under a sigmoid, best first.
 *
 * @param {Float32Array} logits (queries, classes).
 * @param {Float32Array} boxes (queries, 4): centre, width and height as shares of the image.
 * @param {[number, number]} imageSize Height and width in pixels.
 * @returns {{score: number, label: number, box: number[]}[]} Boxes are x0, y0, x1, y1 in pixels.
 */
export function candidates(logits, boxes, classes, imageSize) {
  const queries = logits.length / classes;
  const [height, width] = imageSize;
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
  return order.slice(0, Math.max(queries, 100)).map((pair) => {
    const [x, y, w, h] = boxes.subarray(4 * Math.floor(pair / classes), 4 * Math.floor(pair / classes) + 4);
    return {
      score: 1 / (1 + Math.exp(-logits[pair])),
      label: pair % classes,
      box: [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height],
    };
  });
}

/** The candidates with calibrated scores, best first; classes without a curve keep theirs. */
export function calibrate(found, config, names) {
  const curves = config.calibration ?? {};
  return found
    .map((one) => ({ ...one, score: onCurve(one.score, curves[names[one.label]]) }))
    .sort((a, b) => b.score - a.score);
}

function onCurve(score, curve) {
  if (!curve) return score;
  if (score <= curve[0][0]) return curve[0][1];
  for (let i = 1; i < curve.length; i += 1) {
    const [[x0, y0], [x1, y1]] = [curve[i - 1], curve[i]];
    if (score <= x1) return y0 + ((score - x0) / (x1 - x0)) * (y1 - y0);
  }
  return curve[curve.length - 1][1];
}

/** The threshold of a class in detection settings; 0.5 for a class that they do not name. */
export function thresholdOf(config, name) {
  const { threshold } = config;
  return typeof threshold === 'number' ? threshold : threshold[name] ?? 0.5;
}

/**
 * The objects that detection settings choose among candidates.
 *
 * @param {object} config The content of detection_config.json.
 * @param {string[]} names Class names by label.
 */
export function select(found, config, names) {
  let chosen = calibrate(found, config, names).filter(
    (one) => one.score > thresholdOf(config, names[one.label]),
  );
  if (config.overlap !== null && config.overlap !== undefined) {
    chosen = withoutOverlaps(chosen, config.overlap, config.class_agnostic);
  }
  return chosen.slice(0, config.max_objects ?? chosen.length);
}

function withoutOverlaps(found, limit, classAgnostic) {
  const kept = [];
  for (const one of found) {
    const rival = (other) => classAgnostic || other.label === one.label;
    if (!kept.some((other) => rival(other) && iou(one.box, other.box) > limit)) kept.push(one);
  }
  return kept;
}

function iou(a, b) {
  const area = ([x0, y0, x1, y1]) => Math.max(0, x1 - x0) * Math.max(0, y1 - y0);
  const shared = area([
    Math.max(a[0], b[0]), Math.max(a[1], b[1]), Math.min(a[2], b[2]), Math.min(a[3], b[3]),
  ]);
  const union = area(a) + area(b) - shared;
  return union > 0 ? shared / union : 0;
}
