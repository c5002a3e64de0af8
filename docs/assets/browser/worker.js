// Runs the model away from the page, which stays usable meanwhile.
import { candidates, normalise, resize, resizedSize } from './reading.js';

let ort;
let session;
let processor;
let classes;

/** Fetches a file and reports how much of it has come. */
async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be fetched (${response.status})`);
  const total = Number(response.headers.get('content-length')) || 0;
  const parts = [];
  let received = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    received += value.length;
    postMessage({ kind: 'progress', received, total });
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function load({ runtime, folder, settings }) {
  [processor, classes] = [settings.processor, settings.names.length];
  ort = await import(new URL('ort.wasm.bundle.min.mjs', runtime).href);
  ort.env.wasm.wasmPaths = runtime;
  // Threads share memory, which browsers allow only to pages that are isolated from others.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  session = await ort.InferenceSession.create(await fetched(new URL('model.onnx', folder).href), {
    logSeverityLevel: 3,
  });
}

async function detect({ image }) {
  const started = performance.now();
  const [height, width] = resizedSize(image.height, image.width, processor.size);
  const pixels = normalise(resize(image, height, width), processor);
  const mask = new BigInt64Array(height * width).fill(1n);
  const { logits, pred_boxes: boxes } = await session.run({
    pixel_values: new ort.Tensor('float32', pixels, [1, 3, height, width]),
    pixel_mask: new ort.Tensor('int64', mask, [1, height, width]),
  });
  const found = candidates(logits.data, boxes.data, classes, [image.height, image.width]);
  return { found, milliseconds: performance.now() - started };
}

onmessage = async ({ data }) => {
  try {
    if (data.kind === 'load') {
      await load(data);
      postMessage({ kind: 'ready' });
    } else {
      postMessage({ kind: 'found', number: data.number, ...(await detect(data)) });
    }
  } catch (error) {
    postMessage({ kind: 'error', number: data.number, stage: data.kind, message: String(error.message ?? error) });
  }
};
