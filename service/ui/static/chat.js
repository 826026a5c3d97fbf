// The chat tab.

import { element } from "./dom.js";
import { picker } from "./models.js";
import { descriptors, drawer } from "./parameters.js";

export async function mount(root) {
  const settings = element("div", { id: "settings" });
  root.append(settings);
  picker(settings, { id: "checkpoint" });
  const parameters = element("div");
  settings.append(parameters);
  drawer(parameters, { descriptors: await descriptors() });
}
