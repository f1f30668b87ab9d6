// Tokens are chosen by click, Enter or space; the arrow keys go from one to the next.
const tokens = () => [...element.querySelectorAll("[data-token]")];
const tokenOf = (event) => event.target.closest("[data-token]");

const choose = (token) => {
  tokens().forEach((other) => other.setAttribute("aria-pressed", String(other === token)));
  trigger("select", { index: Number(token.dataset.token) });
};

element.addEventListener("click", (event) => {
  const token = tokenOf(event);
  if (token) choose(token);
});

element.addEventListener("keydown", (event) => {
  const token = tokenOf(event);
  if (!token) return;
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Enter" || event.key === " ") choose(token);
  else if (step) tokens()[Number(token.dataset.token) + step]?.focus();
  else return;
  event.preventDefault();
});
