// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
//
// node shoot.mjs URL OUT.png [WIDTH [HEIGHT]]: opens the page, waits until it is finished, takes a
// picture of the whole page (of the first screen if a height is given), and prints as JSON what the
// page holds: each panel's state, rows and painted pixels.
import { chromium } from 'playwright-core';

const [url, picture, width = '1600', height = '1000'] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
    '--disable-background-networking', '--disable-component-update'],
});
const page = await browser.newPage({ viewport: { width: Number(width), height: Number(height) } });
const problems = [];
page.on('pageerror', (error) => problems.push('page: ' + String(error.stack || error).slice(0, 900)));
page.on('requestfailed', (request) => {
  // Icons of a panel that was drawn anew are given up: no finding.
  if (request.failure()?.errorText !== 'net::ERR_ABORTED') problems.push('request failed: ' + request.url());
});
page.on('response', (response) => {
  if (response.status() >= 400) problems.push(`${response.status()} from ${response.url()}`);
});
// What the first screen costs: requests to the store, from the first one to the last answer.
const asked = [];
page.on('request', (request) => { if (request.url().includes('/prom/')) asked.push(request); });
await page.goto(url);

const look = () => page.evaluate(() => {
  // Texts that reach over the box that clips them, by the page's own layout.
  const cut = () => {
    const found = [];
    const walker = document.createTreeWalker(document.getElementById('root'), NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      // What is said to screen readers alone has no box.
      if (!node.data.trim() || node.data === 'Series color') continue;
      const range = document.createRange();
      range.selectNodeContents(node);
      const text = range.getBoundingClientRect();
      if (text.width < 2 || text.height < 2) continue;
      let box = node.parentElement;
      while (box && getComputedStyle(box).overflowX === 'visible') box = box.parentElement;
      if (!box || !['hidden', 'clip'].includes(getComputedStyle(box).overflowX)) continue;
      const clip = box.getBoundingClientRect();
      if (text.right > clip.right + 1 || text.left < clip.left - 1) found.push(node.data);
    }
    return found;
  };
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
    cut: cut(),
    seconds: (() => {
      const answers = performance.getEntriesByType('resource').filter((entry) => entry.name.includes('/prom/'));
      const begin = Math.min(...answers.map((entry) => entry.startTime));
      return (Math.max(...answers.map((entry) => entry.responseEnd)) - begin) / 1000;
    })(),
    panels: [...document.querySelectorAll('.visualization')].map((panel) => ({
      title: panel.dataset.title,
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
async function settled(seconds, inSight) {
  const dashboard = await (await fetch(new URL(`/${new URL(url).searchParams.get('board')}.json`, url))).json();
  const open = new URL(url).searchParams.has('open');
  const panels = dashboard.panels.flatMap((panel) => [panel, ...((open && panel.panels) || [])]);
  const expected = panels.filter((panel) => panel.type !== 'row').length;
  let before = '';
  for (const end = Date.now() + seconds * 1000; Date.now() < end; ) {
    const seen = await look();
    const answered = seen.panels.length === expected
      && seen.panels.every((panel) => panel.type === 'text' || ['Done', 'Error'].includes(panel.state))
      && (!inSight || seen.panels.every((panel) => panel.text || panel.canvases.length));
    const now = JSON.stringify([seen.panels, seen.height]);
    if (answered && now === before) return seen;
    before = now;
    await new Promise((resolve) => setTimeout(resolve, 700));
  }
  problems.push(`not all panels finished in ${seconds} s`);
  return look();
}

let found = await settled(90, false);
found.requests = asked.length;
const { requests, seconds } = found;
if (!process.argv[5]) {
  // A window as high as the page: tables draw only the rows that are in sight.
  await page.setViewportSize({ width: Number(width), height: found.height });
  found = await settled(60, true);
}
await page.screenshot({ path: picture });
found = { ...found, requests, seconds };
found.problems.push(...problems);
console.log(JSON.stringify(found, null, 1));
await browser.close();
