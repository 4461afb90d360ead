// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
//
// node shoot.mjs URL OUT.png [WIDTH [HEIGHT]]: opens the page, waits until no panel is loading, takes
// a picture of the whole page (of the first screen if a height is given), and prints what the page holds as JSON: each panel's state, rows and painted pixels.
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
page.on('requestfailed', (request) => problems.push('request failed: ' + request.url()));
await page.goto(url);
try {
  await page.waitForFunction(async () => {
    const panels = [...document.querySelectorAll('.visualization')];
    const expected = (await (await fetch('/dashboard.json')).json()).panels.filter((p) => p.type !== 'row').length;
    return panels.length === expected && panels.every((p) => p.dataset.type === 'text' || ['Done', 'Error'].includes(p.dataset.state));
  }, null, { timeout: 60000, polling: 250 });
  // A window as high as the page: tables draw only the rows that are in sight.
  const whole = await page.evaluate(() => document.documentElement.scrollHeight);
  if (!process.argv[5]) await page.setViewportSize({ width: Number(width), height: whole });
  await page.waitForTimeout(1500);
} catch (error) {
  problems.push('not all panels finished: ' + String(error).slice(0, 300));
}
await page.screenshot({ path: picture });
const found = await page.evaluate(() => {
  const painted = (canvas) => {
    if (!canvas.width || !canvas.height) return 0;
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let count = 0;
    for (let i = 3; i < pixels.length; i += 4) if (pixels[i]) count++;
    return count;
  };
  return {
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
found.problems.push(...problems);
console.log(JSON.stringify(found, null, 1));
await browser.close();
