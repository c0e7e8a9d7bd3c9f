// Shows /fleet.json once a second. Text goes in as text, never as HTML; the page reads and can change nothing.
"use strict";

const POLL_MS = 1000;
const WINDOW_MS = 60000; // over which rates and latencies are taken
const history = [];

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count < 100 ? count.toPrecision(3) : Math.round(count)} ${units[unit]}`;
}

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${(1000 * value).toPrecision(3)} ms` : `${value.toPrecision(3)} s`;
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

// The bound under which the fraction of the values lies; null without any. Without before: of all since the start.
function quantile(now, before, fraction) {
  const counts = now.counts.map((count, index) => count - (before ? before.counts[index] : 0));
  const wanted = fraction * sum(counts);
  if (wanted <= 0) return null;
  let reached = 0;
  const found = counts.findIndex((count) => (reached += count) >= wanted);
  return now.bounds[Math.min(found, now.bounds.length - 1)];
}

// Of the window, or since the start if the window has seen none.
function latencyTile(name, now, before) {
  const recent = quantile(now, before, 0.5) === null ? null : before;
  const detail = `p95 ${seconds(quantile(now, recent, 0.95))}${recent ? "" : ", since start"}`;
  return tile(`${name}, p50`, seconds(quantile(now, recent, 0.5)), detail);
}

function rate(now, before, count) {
  const elapsed = now.time_s - before.time_s;
  return elapsed > 0 ? Math.max(0, count(now) - count(before)) / elapsed : 0;
}

function tile(name, value, detail) {
  return element("div", "tile", element("div", "value", value), element("div", "name", name), element("div", "detail", detail || ""));
}

function tiles(now, before) {
  const fleet = now.fleet;
  const replicas = fleet.replicas;
  const ends = (state) => sum(Object.values(state.ends));
  const prompts = (state) => sum(state.fleet.replicas.map((replica) => replica.stats.num_prompt_tokens));
  const outputs = sum(replicas.map((replica) => replica.output_tokens_per_s));
  const running = sum(replicas.map((replica) => replica.stats.num_running));
  const waiting = sum(replicas.map((replica) => replica.stats.num_waiting));
  return element(
    "section",
    "tiles",
    tile("tokens/s out", outputs.toFixed(0), `${rate(now, before, prompts).toFixed(0)} prompt tokens/s`),
    tile("requests/s ended", rate(now, before, ends).toFixed(1), `${ends(now)} since start, ${now.ends.error} failed`),
    tile("running", running, `${waiting} waiting in replicas`),
    tile("queued", fleet.num_queued_requests, `${fleet.num_live_requests} in flight`),
    latencyTile("first token", now.first_token_s, before.first_token_s),
    latencyTile("between tokens", now.inter_token_s, before.inter_token_s),
    ...(fleet.num_wanted_spares ? [tile("spares ready", `${fleet.num_ready_spares} of ${fleet.num_wanted_spares}`)] : []),
  );
}

function bar(label, share, detail) {
  const track = element("progress", share > 0.9 ? "full" : "");
  track.max = 1;
  track.value = share;
  return element("div", "bar", element("span", "name", label), track, element("span", "detail", detail));
}

// Over the window, or since the shard was formed: it tells how it does every ten seconds only.
function meanStep(load, before) {
  if (!load) return "no report yet";
  if (!load.num_steps) return "no step yet";
  const since = before && before.num_steps < load.num_steps ? before : { num_steps: 0, busy_s: 0 };
  return `step ${seconds((load.busy_s - since.busy_s) / (load.num_steps - since.num_steps))}`;
}

function layersOf(shard) {
  const last = shard.first_layer + shard.num_layers - 1;
  if (shard.num_layers < 2) return shard.num_layers ? `layer ${last}` : "no layers";
  return `layers ${shard.first_layer}–${last}`;
}

function shardCell(replica, shard, before) {
  const load = replica.loads[shard.rank];
  return element(
    "td",
    `shard ${replica.state}`,
    element("div", "where", `${shard.host} · ${shard.device}`),
    element("div", "detail", `pid ${shard.pid} · ${layersOf(shard)}`),
    element("div", "detail", `${shard.num_heads} heads · ${shard.num_kv_heads} kv`),
    element("div", "detail", meanStep(load, before && before.loads[shard.rank]), load ? ` · ${bytes(load.memory_bytes)}` : ""),
  );
}

function grid(replica, before) {
  const stages = [...new Set(replica.shards.map((shard) => shard.stage))].sort((a, b) => a - b);
  const ranks = [...new Set(replica.shards.map((shard) => shard.tp_rank))].sort((a, b) => a - b);
  const head = element("tr", "", element("th", "", ""), ...ranks.map((rank) => element("th", "", `tensor ${rank}`)));
  const rows = stages.map((stage) =>
    element(
      "tr",
      "",
      element("th", "", `stage ${stage}`),
      ...ranks.map((rank) => {
        const shard = replica.shards.find((one) => one.stage === stage && one.tp_rank === rank);
        return shard ? shardCell(replica, shard, before) : element("td", "", "");
      }),
    ),
  );
  return element("div", "scroll", element("table", "grid", element("tbody", "", head, ...rows)));
}

function replicaCard(replica, before) {
  const stats = replica.stats;
  const card = element(
    "section",
    "replica",
    element("h2", "", `replica ${replica.replica_id} `, element("span", `state ${replica.state}`, replica.state)),
  );
  if (replica.reason) card.append(element("p", "reason", `${replica.reason} ${Math.round(100 * replica.progress)} %`));
  if (stats.num_pages) {
    const tokens = (stats.num_pages * stats.block_size).toLocaleString("en");
    const share = stats.num_used_pages / stats.num_pages;
    card.append(bar("KV cache", share, `${(100 * share).toFixed(0)} % of ${tokens} tokens`));
    const found = stats.num_prefix_hits ? ` · ${((100 * stats.num_prefix_hits) / stats.num_prefix_queries).toFixed(0)} % of prompts found computed` : "";
    const drafted = stats.num_drafted_tokens ? ` · ${((100 * stats.num_accepted_tokens) / stats.num_drafted_tokens).toFixed(0)} % of drafted tokens right` : "";
    const line = `${replica.output_tokens_per_s.toFixed(0)} tokens/s · ${stats.num_running} running · ${stats.num_waiting} waiting · step ${seconds(stats.step_time_s)} · ${stats.num_preemptions} preemptions${found}${drafted}`;
    card.append(element("p", "detail", stats.expert_imbalance ? `${line} · busiest expert ${stats.expert_imbalance.toFixed(1)}× the mean` : line));
  }
  if (replica.shards.length) card.append(grid(replica, before));
  const failure = replica.last_failure;
  if (failure) {
    const when = new Date(1000 * failure.time_s).toLocaleTimeString();
    const where = failure.stage === null ? "" : `stage ${failure.stage} tensor ${failure.tp_rank} on ${failure.host} `;
    card.append(element("p", "failure", `${replica.num_recoveries} recoveries; last failure ${when}: ${where}${failure.kind}: ${failure.cause}`));
  }
  return card;
}

function operationLine(operation) {
  const since = new Date(1000 * operation.start_time_s).toLocaleTimeString();
  return `${operation.kind} since ${since}: ${operation.progress.doing} ${Math.round(100 * operation.progress.fraction)} %`;
}

function show(now) {
  while (history.length > 1 && 1000 * (now.time_s - history[0].time_s) > WINDOW_MS) history.shift();
  const before = history[0] || now;
  history.push(now);
  const fleet = now.fleet;
  const former = new Map(before.fleet.replicas.map((replica) => [replica.replica_id, replica]));
  document.title = `${fleet.state} – ${fleet.model_id} – shardray`;
  document.body.replaceChildren(
    element("header", "", element("h1", "", fleet.model_id, " ", element("span", `state ${fleet.state}`, fleet.state)), element("span", "detail", `shardray ${now.version}`)),
    ...(fleet.reason ? [element("p", "reason", fleet.reason)] : []),
    ...(fleet.operation ? [element("p", "reason", operationLine(fleet.operation))] : []),
    tiles(now, before),
    ...fleet.replicas.map((replica) => replicaCard(replica, sameMesh(replica, former.get(replica.replica_id)))),
  );
}

// What a replica was at the window's start, if it has run on the same processes since.
function sameMesh(now, before) {
  const pids = (replica) => replica.shards.map((shard) => shard.pid).join();
  return before && pids(before) === pids(now) ? before : null;
}

async function poll() {
  try {
    const answer = await fetch("fleet.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
    show(await answer.json());
    document.body.classList.remove("lost");
  } catch (error) {
    document.body.classList.add("lost");
    document.title = `no answer – shardray`;
  }
  setTimeout(poll, POLL_MS);
}

poll();
