// Looks at a page as people do: screenshots, axe-core's rules, the keyboard, a narrow screen, no script.
// usage: node check.mjs URL PREFIX    (screenshots are PREFIX-light.png, PREFIX-dark.png, PREFIX-narrow.png)
// Says what is wrong on stdout, a line each; exit status 1 then.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const [url, prefix] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const problems = [];

const browser = await chromium.launch({ executablePath: "/usr/bin/chromium-headless-shell" });
try {
    for (const [name, colorScheme, width] of [
        ["light", "light", 1100],
        ["dark", "dark", 1100],
        ["narrow", "light", 320],
    ]) {
        const context = await browser.newContext({ colorScheme, viewport: { width, height: 800 } });
        const page = await context.newPage();
        // What a policy forbids, and what is not found, is said there.
        page.on("console", (message) => problems.push(`${name}: console: ${message.text()}`));
        page.on("request", (request) => {
            if (request.url() !== url) problems.push(`${name}: it asks for ${request.url()}`);
        });
        const response = await page.goto(url);
        if (response.status() !== 200) problems.push(`${name}: status ${response.status()}`);
        if ((await page.locator("script").count()) > 0) problems.push(`${name}: it has a script`);
        await page.screenshot({ path: `${prefix}-${name}.png`, fullPage: true });

        const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        if (wide > 0) problems.push(`${name}: ${wide} pixels wider than a screen of ${width}`);

        // All that can be focused is reached by Tab, and its focus is seen.
        const focusable = await page.locator("a:visible, summary:visible, [tabindex]:visible").count();
        const reached = new Set();
        for (let n = 0; n < focusable; n++) {
            await page.keyboard.press("Tab");
            const at = await page.evaluate(() => {
                const element = document.activeElement;
                const style = getComputedStyle(element);
                const all = [...document.querySelectorAll("*")];
                return { index: all.indexOf(element), tag: element.tagName, outline: style.outlineStyle };
            });
            if (at.tag === "BODY") break;
            reached.add(at.index);
            if (at.outline === "none") problems.push(`${name}: the focus on ${at.tag} is not seen`);
        }
        if (reached.size !== focusable) {
            problems.push(`${name}: Tab reaches ${reached.size} of ${focusable} elements`);
        }

        for (const summary of await page.locator("summary").all()) {
            await summary.press("Enter");
            if (!(await summary.evaluate((element) => element.parentElement.open))) {
                problems.push(`${name}: a summary does not open by keyboard`);
            }
        }
        await page.evaluate(axe);
        const { violations } = await page.evaluate(() => globalThis.axe.run());
        for (const { id, help, nodes } of violations) {
            const where = nodes.map((node) => node.target.join(" ")).join(", ");
            problems.push(`${name}: axe: ${id}: ${help}: ${where}`);
        }
        await context.close();
    }

    // The same without scripts.
    const texts = [];
    for (const javaScriptEnabled of [true, false]) {
        const context = await browser.newContext({ javaScriptEnabled });
        const page = await context.newPage();
        await page.goto(url);
        texts.push(await page.locator("main h2").allTextContents());
        await context.close();
    }
    if (texts[1].length === 0 || `${texts[0]}` !== `${texts[1]}`) {
        problems.push(`without scripts it shows ${texts[1]}, with them ${texts[0]}`);
    }
} finally {
    await browser.close();
}
for (const problem of problems) console.log(problem);
process.exitCode = problems.length > 0 ? 1 : 0;
