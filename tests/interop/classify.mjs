// Classify texts with transformers.js from a bundle's folder, and with nothing from the network.
//
//   node classify.mjs BUNDLE [MODEL_TYPE] < texts.json > answers.json
//
// Texts come as a JSON array, answers go out as one: for each text its label and that label's score.
// MODEL_TYPE stands for the one in config.json, for a model from scratch, whose own nobody else knows.
import { readFileSync } from 'node:fs';
import { basename, dirname, resolve } from 'node:path';
import { env, pipeline, PretrainedConfig } from '@huggingface/transformers';

globalThis.fetch = () => {
  throw new Error('the network was asked');
};
const folder = resolve(process.argv[2]);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);

const options = { subfolder: '', dtype: 'fp32' };
if (process.argv[3]) {
  const config = JSON.parse(readFileSync(resolve(folder, 'config.json'), 'utf8'));
  options.config = new PretrainedConfig({ ...config, model_type: process.argv[3] });
}
const classify = await pipeline('text-classification', basename(folder), options);
const answers = await classify(JSON.parse(readFileSync(0, 'utf8')));
process.stdout.write(JSON.stringify(answers));
