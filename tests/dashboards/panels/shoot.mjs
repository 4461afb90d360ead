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
await page.goto(url);

const look = () => page.evaluate(() => {
  const painted = (canvas) => {
    if (!canvas.width || !canvas.height) return 0;
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let count = 0;
    for (let i = 3; i < pixels.length; i += 4) if (pixels[i]) count++;
    return count;
  };
  return {
    height: document.documentElement.scrollHeight,
    queries: window.queries,
    problems: window.problems,
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
  const dashboard = await (await fetch(new URL('/dashboard.json', url))).json();
  const expected = dashboard.panels.filter((panel) => panel.type !== 'row').length;
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
if (!process.argv[5]) {
  // A window as high as the page: tables draw only the rows that are in sight.
  await page.setViewportSize({ width: Number(width), height: found.height });
  found = await settled(60, true);
}
await page.screenshot({ path: picture });
found.problems.push(...problems);
console.log(JSON.stringify(found, null, 1));
await browser.close();
