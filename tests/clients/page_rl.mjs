// The web page of `engine rl --serve` in headless Chromium: the run's curves grow while it answers.
import assert from 'node:assert/strict';
import puppeteer from 'puppeteer-core';

const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox', '--disable-dev-shm-usage'] });
try {
  const page = await browser.newPage();
  const faults = [];
  page.on('pageerror', (e) => faults.push(e.message));
  await page.goto(process.env.BASE + '/');
  const step = () => page.$eval('#step', (e) => Number(e.textContent));
  await page.waitForFunction(() => !document.querySelector('#rl').hidden && Number(document.querySelector('#step').textContent) >= 2, { timeout: 60_000 });
  const first = await step();
  // Two curves with their names and last values, and as many points as steps.
  const curves = () => page.$$eval('#curves p', (all) => all.map((e) => e.textContent));
  const points = () => page.$$eval('#curves polyline', (all) => all.map((e) => e.getAttribute('points').split(' ').length));
  assert.match((await curves()).join(), /^reward -?\d.*,entropy \d/);
  assert.equal((await points()).length, 2);
  const before = await points();
  await page.$eval('#temperature', (e) => { e.value = '0'; });
  await page.type('#text', '1+1=');
  await page.click('#send');
  await page.waitForFunction(() => document.querySelector('.assistant .tok') && !document.querySelector('#send').disabled, { timeout: 30_000 });
  await page.waitForFunction((last) => Number(document.querySelector('#step').textContent) > last, { timeout: 60_000 }, first);
  const after = await points();
  assert.ok(after.every((count, i) => count > before[i]), `${before} points, then ${after}`);
  assert.deepEqual(faults, []);
} finally {
  await browser.close();
}
