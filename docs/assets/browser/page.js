// The page "Try it in the browser": takes an image, has the worker run the model, shows what it finds.
import { select, thresholdOf } from './reading.js';

const COLOURS = ['#009e73', '#d55e00', '#0072b2', '#cc79a7', '#e69f00', '#56b4e9'];
const MOST_PIXELS = 25e6;

const root = document.getElementById('detect');
const part = (name) => root.querySelector(`[data-part="${name}"]`);
const folder = new URL('./', import.meta.url);

let settings; // classes, preparation, detection settings; where the model and its runtime are
let worker;
let ready; // settles when the model is loaded
let shown = null; // the image, and the candidates found in it
let number = 0; // of the image that was chosen last

async function start() {
  const response = await fetch(new URL('model/settings.json', folder));
  if (!response.ok) {
    fail(
      'This copy of the documentation was built without the model. Install the extra “export” and build the ' +
        'documentation again.',
    );
    part('input').hidden = true;
    return;
  }
  settings = await response.json();
  part('samples').append(...settings.samples.map(sampleButton));
  part('sliders').append(...sliders());
  part('file').addEventListener('change', ({ target }) => {
    if (target.files.length) take(target.files[0]);
    target.value = '';
  });
  root.addEventListener('dragover', (event) => {
    event.preventDefault();
    part('drop').classList.add('over');
  });
  root.addEventListener('dragleave', () => part('drop').classList.remove('over'));
  root.addEventListener('drop', (event) => {
    event.preventDefault();
    part('drop').classList.remove('over');
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
  document.addEventListener('paste', (event) => {
    const [file] = event.clipboardData?.files ?? [];
    if (file) take(file);
  });
  new ResizeObserver(() => shown && draw()).observe(part('canvas'));
  root.dataset.state = 'waiting';
}

function sampleButton(name) {
  const button = document.createElement('button');
  const url = new URL(`model/${name}`, folder).href;
  button.type = 'button';
  button.innerHTML = '<img alt=""><span>Use the sample</span>';
  button.querySelector('img').src = url;
  button.addEventListener('click', async () => {
    try {
      const response = await fetch(url);
      if (!response.ok) throw new Error(String(response.status));
      await take(await response.blob());
    } catch {
      fail('The sample cannot be fetched. Choose an image of your own.');
    }
  });
  return button;
}

// One slider for all classes, or one for each where their thresholds differ.
function sliders() {
  const each = typeof settings.detection.threshold !== 'number';
  return (each ? settings.names : [null]).map((name) => {
    const label = document.createElement('label');
    label.innerHTML = '<span></span><input type="range" min="0.05" max="0.95" step="0.01"><output></output>';
    const [text, input, output] = label.children;
    text.textContent = name === null ? 'Threshold' : `Threshold of ${name}`;
    input.value = thresholdOf(settings.detection, name);
    output.value = Number(input.value).toFixed(2);
    input.addEventListener('input', () => {
      const value = Number(input.value);
      output.value = value.toFixed(2);
      settings.detection.threshold = name === null ? value : { ...settings.detection.threshold, [name]: value };
      if (shown) show();
    });
    return label;
  });
}

/** Loads the model, when the first image needs it. */
function model() {
  ready ??= new Promise((resolve, reject) => {
    worker = new Worker(new URL('worker.js', folder), { type: 'module' });
    worker.onerror = () => reject(new Error('this browser cannot run it'));
    worker.onmessage = ({ data }) => {
      if (data.kind === 'ready') resolve();
      else if (data.kind === 'progress') loading(data);
      else if (data.kind === 'found') found(data);
      else if (data.stage === 'load') reject(new Error(data.message));
      else if (data.number === number) fail(`The model cannot run on this image: ${data.message}`);
    };
    const runtime = new URL(settings.runtime, folder).href;
    worker.postMessage({ kind: 'load', runtime, folder: new URL('model/', folder).href, settings });
  });
  return ready;
}

/** Detects in an image file. */
async function take(file) {
  const own = (number += 1);
  shown = null;
  busy('Reading the image');
  const image = await decoded(file);
  if (own !== number) return;
  if (typeof image === 'string') {
    fail(image);
    return;
  }
  part('canvas').width = image.width;
  part('canvas').height = image.height;
  part('canvas').getContext('2d').drawImage(image, 0, 0);
  root.dataset.image = 'yes';
  const { data, width, height } = pixelsOf(image);
  try {
    busy('Loading the model');
    await model();
  } catch (error) {
    ready = undefined;
    worker.terminate();
    if (own === number) fail(`The model cannot be loaded: ${error.message}. Check the connection and try again.`);
    return;
  }
  if (own !== number) return;
  busy('Looking for cells');
  shown = { image, candidates: null };
  worker.postMessage({ kind: 'detect', number: own, image: { data, width, height } }, [data.buffer]);
}

/** The image of a file, or why there is none. */
async function decoded(file) {
  try {
    const image = await createImageBitmap(file, { colorSpaceConversion: 'none', premultiplyAlpha: 'none' });
    if (image.width * image.height <= MOST_PIXELS) return image;
    return `The image has ${image.width} × ${image.height} pixels; the most are 25 million. Make it smaller.`;
  } catch {
    return 'This file is not an image that the browser can read. Choose a JPEG, PNG or WebP file.';
  }
}

function pixelsOf(image) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

function found({ number: own, found: candidates, milliseconds }) {
  if (own !== number) return;
  shown.candidates = candidates;
  shown.seconds = milliseconds / 1000;
  show();
}

// What is seen

function show() {
  const { names, detection } = settings;
  if (!shown.candidates) return;
  shown.objects = select(shown.candidates, detection, names);
  const counts = names.map((_, label) => shown.objects.filter((one) => one.label === label).length);
  part('counts').replaceChildren(
    ...names.map((name, label) => {
      const row = document.createElement('tr');
      row.innerHTML = '<th scope="row"><i></i><span></span></th><td></td>';
      row.querySelector('i').style.background = colour(label);
      row.querySelector('span').textContent = name;
      row.querySelector('td').textContent = counts[label];
      return row;
    }),
  );
  part('total').textContent = shown.objects.length;
  part('empty').hidden = shown.objects.length > 0;
  part('time').textContent = `${shown.seconds.toFixed(1)} s on this device`;
  state('done', '');
  draw();
}

function draw() {
  const canvas = part('canvas');
  const context = canvas.getContext('2d');
  const unit = canvas.width / (canvas.clientWidth || canvas.width); // a pixel of the screen
  context.drawImage(shown.image, 0, 0);
  for (const { box, label } of shown.objects ?? []) {
    const [x0, y0, x1, y1] = box;
    for (const [width, style] of [[4, 'rgb(255 255 255 / 80%)'], [2, colour(label)]]) {
      context.lineWidth = width * unit;
      context.strokeStyle = style;
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  }
}

function colour(label) {
  return COLOURS[label % COLOURS.length];
}

function loading({ received, total }) {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  const of = total ? ` of ${megabytes(total)}` : '';
  busy(`Loading the model: ${megabytes(received)}${of} MB`);
  const bar = part('bar');
  if (total) bar.value = received / total;
  else bar.removeAttribute('value');
}

function busy(text) {
  part('bar').removeAttribute('value');
  state('busy', `${text} …`);
}

function fail(text) {
  state('failed', text);
}

function state(name, text) {
  root.dataset.state = name;
  part('status').textContent = text;
}

start().catch((error) => fail(`The page cannot start: ${error.message}. Reload it.`));
