// Validates custom resources against the models of their CRDs: node crds.mjs FOLDER < documents.json
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "keda.sh/v1alpha1/ScaledObject": "keda",
  "monitoring.coreos.com/v1/PodMonitor": "prometheus-operator",
  "monitoring.coreos.com/v1/PrometheusRule": "prometheus-operator",
};
const models = join(process.argv[2], "node_modules", "@kubernetes-models");
const found = [];
for (const document of JSON.parse(readFileSync(0, "utf8"))) {
  const name = `${document.apiVersion}/${document.kind}`;
  if (!(name in PACKAGES)) {
    found.push({ name, checked: false });
    continue;
  }
  const file = join(models, PACKAGES[name], `${name}.js`);
  const Model = (await import(pathToFileURL(file)))[document.kind];
  try {
    new Model(document).validate();
    found.push({ name, checked: true });
  } catch (error) {
    found.push({ name, checked: true, error: String(error.message) });
  }
}
console.log(JSON.stringify(found));
