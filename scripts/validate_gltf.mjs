// Runs the Khronos glTF validator and prints one JSON report per line; called by scripts/validate_gltf.py.
// Usage: node validate_gltf.mjs NODE_MODULES FILE...
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';

const [modules, ...files] = process.argv.slice(2);
const require = createRequire(path.join(path.resolve(modules), 'resolve-from-here.js'));
const validator = require('gltf-validator');

for (const file of files) {
  const folder = path.dirname(path.resolve(file));
  const report = await validator.validateBytes(new Uint8Array(await readFile(file)), {
    uri: path.basename(file),
    maxIssues: 1000,
    externalResourceFunction: async (uri) => new Uint8Array(await readFile(path.join(folder, decodeURIComponent(uri)))),
  });
  console.log(JSON.stringify(report));
}
