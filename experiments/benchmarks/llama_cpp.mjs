// A text that llama.cpp goes on with, as a server: `llama_cpp.py` starts it and asks for some tokens at a time.
//
//     node llama_cpp.mjs NODE_MODULES MODEL.gguf CONTEXT
//
// Standard input: first the ids of the context as JSON, then a number of tokens a line.  Standard output: a line
// once the context is read, then the milliseconds that the tokens took.
import path from "node:path";
import readline from "node:readline";
import { pathToFileURL } from "node:url";

const [, , modules, file, context] = process.argv;
const { getLlama } = await import(pathToFileURL(path.resolve(modules, "node-llama-cpp/dist/index.js")));
const llama = await getLlama({ gpu: false, build: "never", maxThreads: 2, logLevel: "error" });
const model = await llama.loadModel({ modelPath: file });
const room = Number(context) + 512;
const whole = await model.createContext({ contextSize: room, threads: 2, batchSize: 512, flashAttention: true });
const sequence = whole.getSequence();
let tokens;
for await (const line of readline.createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line);
  if (tokens === undefined) {
    await sequence.evaluateWithoutGeneratingNewTokens(asked.slice(0, -1));
    tokens = sequence.evaluate(asked.slice(-1), { temperature: 0, yieldEogToken: true });
    await tokens.next();
    console.log("ready");
    continue;
  }
  const start = performance.now();
  for (let i = 0; i < asked; ++i) await tokens.next();
  console.log(performance.now() - start);
}
