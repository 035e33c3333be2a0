"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const shots = [...document.querySelectorAll("img[data-shot]")];

  function setUpCompare() {
    const section = by("compare");
    if (!section) return;
    const [left, right, picture] = [by("compare-left"), by("compare-right"), by("compare-picture")];
    const [stage, slider] = [by("stage"), by("compare-slider")];
    const models = [...new Set(shots.map((shot) => shot.dataset.model))];
    const pictures = new Map(shots.map((shot) => [shot.dataset.shot, shot.dataset.what]));
    let whole = null; // "left" or "right" while it is shown alone

    const option = (value, text) => {
      const made = document.createElement("option");
      made.value = value;
      made.textContent = text;
      return made;
    };
    for (const model of models) {
      left.append(option(model, model));
      right.append(option(model, model));
    }
    for (const [shot, what] of pictures) picture.append(option(shot, what));
    left.value = section.dataset.left;
    right.value = section.dataset.right;

    const find = (model, which = picture.value) =>
      shots.find((shot) => shot.dataset.model === model && shot.dataset.shot === which);

    // Models of different prompts have not every picture in common: the first that both have.
    function choose() {
      const both = (which) => find(left.value, which) && find(right.value, which);
      if (!both(picture.value)) picture.value = [...pictures.keys()].find(both) ?? picture.value;
      show();
    }

    function put(image, shot) {
      image.src = shot.src;
      image.alt = shot.alt;
      image.className = shot.className;
    }

    function show() {
      const pair = [find(left.value), find(right.value)];
      const there = pair.every(Boolean);
      by("compare-nothing").hidden = there;
      stage.hidden = !there;
      if (!there) return;
      put(by("stage-left"), pair[0]);
      put(by("stage-right"), pair[1]);
      by("tag-left").textContent = left.value;
      by("tag-right").textContent = right.value;
      divide();
    }

    function divide() {
      const at = whole === "left" ? 100 : whole === "right" ? 0 : Number(slider.value);
      by("stage-left").style.clipPath = `inset(0 ${100 - at}% 0 0)`;
      by("divide").style.left = `${at}%`;
      by("divide").hidden = whole !== null;
      by("tag-left").hidden = whole === "right";
      by("tag-right").hidden = whole === "left";
    }

    function move(value) {
      whole = null;
      slider.value = value;
      divide();
    }

    function flicker() {
      whole = whole === "left" ? "right" : "left";
      divide();
      by("compare-status").textContent = `Shown: ${whole === "left" ? left.value : right.value}`;
    }

    const toPointer = (event) => {
      const box = stage.getBoundingClientRect();
      move(Math.round((100 * (event.clientX - box.left)) / box.width));
    };
    stage.addEventListener("pointerdown", (event) => {
      stage.setPointerCapture(event.pointerId);
      toPointer(event);
    });
    stage.addEventListener("pointermove", (event) => event.buttons && toPointer(event));
    stage.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -4, ArrowDown: -4, ArrowRight: 4, ArrowUp: 4 };
      if (event.key in steps) move(Number(slider.value) + steps[event.key]);
      else if (event.key === "Home") move(0);
      else if (event.key === "End") move(100);
      else if (event.key !== " ") return;
      else if (!event.repeat) flicker();
      event.preventDefault();
    });
    slider.addEventListener("keydown", (event) => {
      if (event.key !== " ") return;
      event.preventDefault();
      if (!event.repeat) flicker();
    });
    slider.addEventListener("input", () => move(slider.value));
    by("compare-flicker").addEventListener("click", flicker);
    for (const each of [left, right]) each.addEventListener("change", choose);
    picture.addEventListener("change", show);
    section.hidden = false;
    choose();
  }

  function setUpCopy() {
    const button = by("copy");
    if (!button) return;
    const recipe = by("recipe-text");
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(recipe.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(recipe);
        button.textContent = "Selected: press Ctrl+C";
      }
      setTimeout(() => (button.textContent = "Copy"), 2500);
    });
  }

  // Paper has nothing to click: what is folded is printed open.
  function setUpPrint() {
    const folded = () => [...document.querySelectorAll("details:not([open])")];
    let opened = [];
    addEventListener("beforeprint", () => {
      opened = folded();
      for (const each of opened) each.open = true;
    });
    addEventListener("afterprint", () => {
      for (const each of opened) each.open = false;
    });
  }

  setUpCompare();
  setUpCopy();
  setUpPrint();
})();
