// What is wider than its box fades on the side where there is more of it, and scrolls by keyboard too.
addEventListener("DOMContentLoaded", () => {
  const mark = box => {
    const hidden = box.scrollWidth - box.clientWidth;
    box.classList.toggle("more", hidden - box.scrollLeft > 2);
    if (hidden > 2 && box.tagName != "A") box.tabIndex = 0;
  };
  const resized = new ResizeObserver(seen => seen.forEach(e => mark(e.target)));
  const watch = selector => document.querySelectorAll(selector).forEach(box => {
    resized.observe(box);
    box.addEventListener("scroll", () => mark(box), { passive: true });
  });
  watch("article :is(.highlight pre, table, .wide, .output.text_html)");
  document.querySelectorAll("nav.page-toc span.pre").forEach(name => name.innerHTML = name.innerHTML.replaceAll("_", "_<wbr>"));
  addEventListener("load", () => window.MathJax?.startup?.promise?.then(() => watch("article :is(span.math, mjx-container)")));
});
