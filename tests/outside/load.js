// Streams from many clients at once, for as long as is said; fails if a threshold is crossed (exit code 99).
//
//   k6 run -e ADDRESS=10.0.0.1:50051 -e STREAMS=64 -e DURATION=60s tests/outside/load.js
//
// It knows no proto: the server must reflect (grpc.reflection). TOKEN and CA (a PEM file) are for servers that ask for them.
import { Client, Stream } from "k6/net/grpc";
import { Counter, Rate, Trend } from "k6/metrics";

const number = (name, unset) => Number(__ENV[name] || unset);
const NUM_STREAMS = number("STREAMS", 32);
const MAX_TOKENS = number("MAX_TOKENS", 50);

const firstToken = new Trend("first_token_ms"); // from the request to the first token
const interToken = new Trend("inter_token_ms"); // between two messages of a stream
const numTokens = new Counter("tokens");
const failed = new Rate("streams_failed"); // ended by an error, or with fewer tokens than were asked for

export const options = {
  vus: NUM_STREAMS,
  duration: __ENV.DURATION || "60s",
  thresholds: {
    first_token_ms: [`p(95)<${number("FIRST_TOKEN_MS", 250)}`],
    inter_token_ms: [`p(99)<${number("INTER_TOKEN_MS", 100)}`],
    tokens: [`rate>${number("TOKENS_PER_S", 1)}`],
    streams_failed: ["rate==0"],
  },
};

const metadata = __ENV.TOKEN ? { authorization: `Bearer ${__ENV.TOKEN}` } : {};
const security = __ENV.CA ? { tls: { cacerts: [open(__ENV.CA)] } } : { plaintext: true };
const client = new Client();

export default function () {
  if (__ITER === 0) {
    client.connect(__ENV.ADDRESS || "127.0.0.1:50051", { reflect: true, reflectMetadata: metadata, ...security });
  }
  const stream = new Stream(client, "shardray.v1.InferenceService/Generate", { metadata });
  let lastMs = Date.now();
  let seen = 0;
  let wrong = "";

  stream.on("data", (message) => {
    const nowMs = Date.now();
    if (message.tokenIds && message.tokenIds.length) {
      (seen ? interToken : firstToken).add(nowMs - lastMs);
      seen += message.tokenIds.length;
      lastMs = nowMs;
    }
  });
  stream.on("error", (error) => {
    wrong = error.message;
  });
  stream.on("end", () => {
    numTokens.add(seen);
    failed.add(wrong !== "" || seen !== MAX_TOKENS);
    if (wrong) {
      console.error(wrong);
    }
  });
  // A text of its own for each stream.
  const text = `stream ${__VU}, request ${__ITER}`;
  stream.write({ text, sampling: { temperature: 0, maxTokens: MAX_TOKENS, ignoreEos: true } });
  stream.end();
}
