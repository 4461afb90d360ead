// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
//
// node shoot.mjs URL OUT.png [WIDTH [HEIGHT [BESIDE...]]]: opens the page, waits until it is finished,
// takes a picture of the whole page (of the first screen if a height is given), and prints as JSON
// what the page holds: each panel's state, rows and painted pixels. Pages BESIDE it are opened in the
// same moment, and what they asked is told too.
import { chromium } from 'playwright-core';

const [url, picture, width = '1600', height = '1000', ...beside] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
    '--disable-background-networking', '--disable-component-update'],
});
const problems = [];

// The panel that something is in, and what it says: where to look.
function inPanel(element, text) {
  const title = element.closest('.visualization')?.dataset.title;
  return title ? `${title}: ${text}` : text;
}

// Texts that reach over the box that clips them, by the page's own layout; and those below a box that
// has to be scrolled to see them. Lines of a table are no such texts: a table is there to be scrolled.
function cut() {
  const found = [];
  const walker = document.createTreeWalker(document.getElementById('root'), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    // What is said to screen readers alone has no box.
    if (!node.data.trim() || node.data === 'Series color') continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const text = range.getBoundingClientRect();
    if (text.width < 2 || text.height < 2) continue;
    const rolled = (one) => ['auto', 'scroll'].includes(getComputedStyle(one).overflowY);
    let scrolled = node.parentElement;
    while (scrolled && !rolled(scrolled)) scrolled = scrolled.parentElement;
    if (scrolled?.closest('.visualization') && !scrolled.matches('[role=grid]')
      && text.bottom > scrolled.getBoundingClientRect().bottom + 1) {
      found.push(inPanel(scrolled, node.data));
    }
    let box = node.parentElement;
    while (box && getComputedStyle(box).overflowX === 'visible') box = box.parentElement;
    if (!box || !['hidden', 'clip'].includes(getComputedStyle(box).overflowX)) continue;
    const clip = box.getBoundingClientRect();
    if (text.right > clip.right + 1 || text.left < clip.left - 1) found.push(inPanel(box, node.data));
  }
  return found;
}

// Texts on canvases that reach over their canvas, or are squeezed, until it is drawn anew.
function watchCanvases() {
  const found = new Map();
  const { fillText, clearRect } = CanvasRenderingContext2D.prototype;
  CanvasRenderingContext2D.prototype.clearRect = function (...box) {
    found.delete(this.canvas);
    return clearRect.apply(this, box);
  };
  CanvasRenderingContext2D.prototype.fillText = function (text, x, y, most) {
    const { width } = this.measureText(text);
    const left = { center: x - width / 2, right: x - width, end: x - width }[this.textAlign] ?? x;
    const ends = [left, left + width].map((at) => this.getTransform().transformPoint({ x: at, y }));
    const outside = ends.some((at) => at.x < -1 || at.x > this.canvas.width + 1 || at.y < -1 || at.y > this.canvas.height + 1);
    if (String(text).trim() && (outside || width > (most ?? Infinity) + 1)) {
      found.set(this.canvas, [...(found.get(this.canvas) ?? []), String(text)]);
    }
    return fillText.apply(this, most === undefined ? [text, x, y] : [text, x, y, most]);
  };
  window.cutOnCanvases = () => [...found].filter(([canvas]) => canvas.isConnected).flatMap(([canvas, texts]) => texts.map((text) => inPanel(canvas, text)));
}

// The same of what lies outside of a table's window: it draws only the cells that are in sight.
async function cutInTables() {
  const found = new Set();
  for (const grid of document.querySelectorAll('[role=grid]')) {
    for (let top = 0; top < grid.scrollHeight; top += grid.clientHeight / 2) {
      for (let left = 0; left < grid.scrollWidth; left += grid.clientWidth / 2) {
        grid.scrollTo(left, top);
        await new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)));
        for (const text of window.cut()) found.add(text);
      }
    }
    grid.scrollTo(0, 0);
  }
  return [...found];
}

// A page of its own, and what its first screen costs: requests to the store.
async function open(address) {
  const page = await browser.newPage({ viewport: { width: Number(width), height: Number(height) } });
  page.on('pageerror', (error) => problems.push('page: ' + String(error.stack || error).slice(0, 900)));
  page.on('requestfailed', (request) => {
    // Icons of a panel that was drawn anew are given up: no finding.
    if (request.failure()?.errorText !== 'net::ERR_ABORTED') problems.push('request failed: ' + request.url());
  });
  page.on('response', (response) => {
    if (response.status() >= 400) problems.push(`${response.status()} from ${response.url()}`);
  });
  const opened = { address, page, requests: 0 };
  page.on('request', (request) => { if (request.url().includes('/prom/')) opened.requests += 1; });
  await page.addInitScript(`window.inPanel = ${inPanel}; window.cut = ${cut}; (${watchCanvases})()`);
  return opened;
}

const look = (page) => page.evaluate(() => {
  const painted = (canvas) => {
    if (!canvas.width || !canvas.height) return 0;
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let count = 0;
    for (let i = 3; i < pixels.length; i += 4) if (pixels[i]) count++;
    return count;
  };
  return {
    height: document.documentElement.scrollHeight,
    bottom: Math.max(...[...document.querySelectorAll('.visualization')].map((one) => one.getBoundingClientRect().bottom)),
    queries: window.queries,
    problems: window.problems,
    cut: [...window.cut(), ...window.cutOnCanvases()],
    // From the first request to the last answer, by the clock that all pages share.
    asked: (() => {
      const answers = performance.getEntriesByType('resource').filter((entry) => entry.name.includes('/prom/'));
      const times = (name) => answers.map((entry) => (performance.timeOrigin + entry[name]) / 1000);
      return [Math.min(...times('startTime')), Math.max(...times('responseEnd'))];
    })(),
    panels: [...document.querySelectorAll('.visualization')].map((panel) => ({
      title: panel.dataset.title,
      bottom: panel.getBoundingClientRect().bottom,
      type: panel.dataset.type,
      state: panel.dataset.state,
      rows: Number(panel.dataset.rows),
      empty: panel.querySelector('.empty')?.innerText ?? null,
      failed: panel.querySelector('.failed')?.innerText ?? null,
      text: panel.innerText.replace(/\s+/g, ' ').slice(0, 2000),
      canvases: [...panel.querySelectorAll('canvas')].map(painted),
    })),
  };
});

// Finished: every panel has its answer (and, if all are in sight, shows something), and two looks in a row see the same page.
async function settled({ address, page }, seconds, inSight) {
  const parameters = new URL(address).searchParams;
  const dashboard = await (await fetch(new URL(`/${parameters.get('board')}.json`, address))).json();
  const panels = dashboard.panels.flatMap((panel) => [panel, ...((parameters.has('open') && panel.panels) || [])]);
  const expected = panels.filter((panel) => panel.type !== 'row').length;
  let before = '';
  for (const end = Date.now() + seconds * 1000; Date.now() < end; ) {
    const seen = await look(page);
    const answered = seen.panels.length === expected
      && seen.panels.every((panel) => panel.type === 'text' || ['Done', 'Error'].includes(panel.state))
      && (!inSight || seen.panels.every((panel) => panel.text || panel.canvases.length));
    const now = JSON.stringify([seen.panels, seen.height]);
    if (answered && now === before) return seen;
    before = now;
    await new Promise((resolve) => setTimeout(resolve, 700));
  }
  problems.push(`not all panels finished in ${seconds} s`);
  return look(page);
}

const pages = await Promise.all([url, ...beside].map(open));
await Promise.all(pages.map(({ address, page }) => page.goto(address)));
const firsts = [];
// One after the other: looking holds a page up.
for (const each of pages) firsts.push(await settled(each, 90, false));
const requests = pages.map((each) => each.requests);
const seconds = Math.max(...firsts.map(({ asked }) => asked[1])) - Math.min(...firsts.map(({ asked }) => asked[0]));
let [found] = firsts;
const [{ page }] = pages;
if (!process.argv[5]) {
  // A window as high as the page: what is not in sight is not drawn.
  await page.setViewportSize({ width: Number(width), height: found.height });
  found = await settled(pages[0], 60, true);
  found.cut = [...new Set([...found.cut, ...(await page.evaluate(cutInTables))])];
}
await page.screenshot({ path: picture });
found = { ...found, requests, seconds };
found.problems.push(...problems);
console.log(JSON.stringify(found, null, 1));
await browser.close();
