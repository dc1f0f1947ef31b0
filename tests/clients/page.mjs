// The web page in headless Chromium: a chat with log-probabilities, stop, live state, no text taken as HTML, both colour schemes, a phone.
import assert from 'node:assert/strict';
import puppeteer from 'puppeteer-core';

const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox', '--disable-dev-shm-usage'] });
try {
  const page = await browser.newPage();
  const faults = [], foreign = [];
  page.on('pageerror', (e) => faults.push(e.message));
  page.on('console', (m) => { if (/Content Security Policy/.test(m.text())) faults.push(m.text()); });
  page.on('request', (r) => { if (!r.url().startsWith(process.env.BASE) && !r.url().startsWith('data:')) foreign.push(r.url()); });
  await page.goto(process.env.BASE + '/');
  await page.waitForFunction(() => document.querySelector('#alarm').textContent === 'API key needed');
  await page.type('#key', process.env.API_KEY);
  await page.waitForFunction(() => document.querySelector('#running').textContent === '0' && /%/.test(document.querySelector('#kv').textContent));
  await page.$eval('#temperature', (e) => { e.value = '0'; });
  await page.type('#text', '47+25=');
  await page.click('#send');
  await page.waitForFunction(() => document.querySelector('.assistant .tok') && !document.querySelector('#send').disabled);
  assert.match(await page.$eval('.assistant', (e) => e.textContent), /\d/);
  await page.hover('.assistant .tok');
  assert.match(await page.$eval('#tip', (e) => (e.hidden ? '' : e.textContent)), /log-prob -?\d.*(\n.*%){5}/);
  const hostile = '<img src=x onerror="window.hit=1"><b id=planted>1+1=</b>';
  await page.type('#text', hostile);
  await page.keyboard.press('Enter');
  await page.waitForFunction(() => document.querySelectorAll('.user').length === 2 && !document.querySelector('#send').disabled);
  assert.equal(await page.$$eval('.user', (e) => e[1].textContent), hostile);
  assert.equal(await page.evaluate(() => window.hit || document.querySelector('#planted')), null);
  await page.$eval('#temperature', (e) => { e.value = '-1'; });
  await page.type('#text', '1+1=');
  await page.click('#send');
  await page.waitForFunction(() => /temperature/.test(document.querySelector('.turn.error')?.textContent ?? ''));
  // Stop: an answer without an end, as the page itself asks for none.
  await page.$eval('#temperature', (e) => { e.value = '1'; });
  await page.click('#logprobs');
  await page.setRequestInterception(true);
  page.on('request', (r) => {
    const endless = (text) => JSON.stringify({ ...JSON.parse(text), n: 100, max_tokens: 900, ignore_eos: true });
    r.continue(r.method() === 'POST' ? { postData: endless(r.postData()) } : {});
  });
  await page.type('#text', '1+1=');
  await page.click('#send');
  await page.waitForFunction(() => document.querySelector('#running').textContent === '100' && document.querySelector('.assistant:last-child').textContent.length > 100);
  assert.ok(await page.$eval('#send', (e) => e.disabled), 'one answer at a time');
  await page.click('#stop');
  await page.waitForFunction(() => !document.querySelector('#send').disabled && document.querySelector('#running').textContent === '0' && document.querySelector('#kv').textContent === '0.0 %');
  const said = () => page.$eval('.assistant:last-child', (e) => e.textContent.length);
  const length = await said();
  assert.ok(length > 100 && length < 80_000, `${length} characters of 90,000`);
  await new Promise((done) => setTimeout(done, 300));
  assert.equal(await said(), length, 'nothing comes after a stop');
  const colour = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: 'light' }]);
  assert.equal(await colour(), 'rgb(255, 255, 255)');
  await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: 'dark' }]);
  assert.equal(await colour(), 'rgb(22, 24, 27)');
  await page.setViewport({ width: 360, height: 740, isMobile: true });
  assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= 360), 'no sideways scrolling on a phone');
  assert.deepEqual([faults, foreign], [[], []]);
} finally {
  await browser.close();
}
