// Judge a folder of cases in Node: HDF5 by h5wasm, nothing else.
//
//   npm ci && node check.mjs FOLDER
//
// Recomputed from the stored arrays: S = Σ x xᵀ over the kept rows (A and G before the division),
// M = U diag(values) Uᵀ, UᵀU = I, the mask as a share of the mass, W' = U_G (C ∘ M) U_Aᵀ.
// Of a certified case (version 2) also, to thirty digits: that each number is the float64 nearest to what is proved, that S, the
// gradients of linear layers, the loss and the logits are what the rows prove, S U = n U diag(values), UᵀU = I, n Σ values = tr S, and W'.
// Each file's SHA-256 is compared with its manifest's, too.
// Exit status 0: valid and acceptable cases hold, invalid ones do not. 1: one is otherwise. 2: usage.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import h5wasm from "h5wasm/node";

const { File } = h5wasm;
const SHARES = { rho50: 0.5, rho90: 0.9 };
const norm = (x) => Math.sqrt(x.reduce((sum, one) => sum + one * one, 0));
const apart = (x, y) => norm(x.map((one, i) => one - y[i]));

// ------------------------------------------------------------------ reading

const get = (file, path) => {
  const found = file.get(path);
  if (!found) return null;
  const value = found.value; // integers of 64 bits come as BigInt
  const x = typeof value === "object" ? Float64Array.from(value, Number) : Float64Array.of(Number(value));
  return { x, shape: found.shape };
};

const layersOf = (file, first, last) => {
  const out = [];
  const walk = (group, at) => {
    for (const key of group.keys()) {
      const node = group.get(key);
      if (node.keys) walk(node, at ? `${at}/${key}` : key);
      else if (key === last) out.push(at);
    }
  };
  const top = file.get(first);
  if (top) walk(top, "");
  return out;
};

// ------------------------------------------------------------------ comparing

function* sums(file, layer, budgets) {
  const keep = get(file, `rows/${layer}/kept`).x;
  const rows = keep.filter((one) => one !== 0).length;
  for (const [group, part, from] of [
    ["factors", "sum_A", "a"], ["factors", "sum_G", "g_sampled"], ["empirical", "sum_G", "g"],
  ]) {
    const S = get(file, `${group}/${layer}/${part}`);
    const x = get(file, `rows/${layer}/${from}`);
    if (!S || !x) continue;
    const d = x.shape.at(-1);
    if (S.x.length !== d * d || x.x.length !== keep.length * d) throw Error(`shapes differ: ${layer}`);
    const want = new Float64Array(d * d);
    for (let r = 0; r < keep.length; r++) {
      if (keep[r] === 0) continue;
      for (let p = 0; p < d; p++)
        for (let q = 0; q < d; q++) want[p * d + q] += x.x[r * d + p] * x.x[r * d + q];
    }
    let trace = 0;
    for (let p = 0; p < d; p++) trace += want[p * d + p];
    const error = apart(S.x, want);
    yield [`${group} ${part} of ${layer}`, error ? error / Math.max(trace, 1e-308) : 0, budgets.sums];
  }
  for (const count of ["n_A", "n_G"]) {
    const n = get(file, `factors/${layer}/${count}`);
    if (n) yield [`${count} of ${layer}`, Math.abs(n.x[0] - rows), 0];
  }
}

function* basis(file, layer, budgets) {
  for (const [side, values] of [["A", "mu"], ["G", "lam"]]) {
    const U = get(file, `basis/${layer}/U_${side}`).x;
    const v = get(file, `basis/${layer}/${values}`).x;
    const S = get(file, `factors/${layer}/sum_${side}`);
    const n = get(file, `factors/${layer}/n_${side}`);
    const d = v.length;
    const r = U.length / d; // r < d: the other values may be 0
    const [made, square, one] = [d, r, r].map((n) => new Float64Array(n * n));
    for (let p = 0; p < d; p++)
      for (let q = 0; q < d; q++)
        for (let k = 0; k < r; k++) made[p * d + q] += U[p * r + k] * v[k] * U[q * r + k];
    for (let p = 0; p < r; p++) {
      one[p * r + p] = 1;
      for (let q = 0; q < r; q++)
        for (let k = 0; k < d; k++) square[p * r + q] += U[k * r + p] * U[k * r + q];
    }
    if (S && n && norm(S.x) > 0) {
      const M = S.x.map((s) => s / n.x[0]);
      yield [`U_${side} of ${layer}`, apart(made, M) / norm(M), budgets.basis];
    }
    yield [`UᵀU of ${side} of ${layer}`, apart(square, one) / Math.sqrt(d), budgets.basis];
    let rise = 0;
    for (let k = 0; k < d; k++) rise = Math.max(rise, -v[k], k ? v[k] - v[k - 1] : 0);
    yield [`${values} of ${layer}`, rise, 0];
  }
}

function* edits(file, layer, budgets) {
  const [lam, mu, V, U] = ["lam", "mu", "U_A", "U_G"].map((x) => get(file, `basis/${layer}/${x}`).x);
  const [O, I] = [lam.length, mu.length];
  const [R, Q] = [U.length / O, V.length / I];
  for (const [share, rho] of Object.entries(SHARES)) {
    const mask = get(file, `edits/${share}/${layer}/mask`)?.x;
    const got = get(file, `edits/${share}/${layer}/weight`)?.x;
    if (!mask || !got) continue;
    const tied = "weights/parameters/embed/weight";
    const W = (get(file, `weights/parameters/${layer}/weight`) ?? get(file, tied)).x;
    if (W.length !== O * I || mask.length !== O * I) throw Error(`shapes differ: ${layer}`);
    let [total, mass, least, most] = [0, 0, Infinity, 0];
    const want = new Float64Array(O * I);
    for (let i = 0; i < O; i++)
      for (let k = 0; k < I; k++) {
        const key = (lam[i] / lam[0]) * (mu[k] / mu[0]);
        total += key;
        if (mask[i * I + k] === 0) {
          most = Math.max(most, key);
          continue;
        }
        mass += key;
        least = Math.min(least, key);
        if (i >= R || k >= Q) continue;
        let C = 0;
        for (let o = 0; o < O; o++)
          for (let p = 0; p < I; p++) C += U[o * R + i] * W[o * I + p] * V[p * Q + k];
        for (let o = 0; o < O; o++)
          for (let p = 0; p < I; p++) want[o * I + p] += U[o * R + i] * C * V[p * Q + k];
      }
    yield [`order of the mask of ${layer}`, Math.max(0, most - least), budgets.mass];
    yield [`share of the mask of ${layer}`, (rho * total - mass) / total, budgets.mass];
    if (mass > 0) yield [`last pair of the mask of ${layer}`, (mass - least) / total - rho, budgets.mass];
    yield [`edited weight of ${layer}`, apart(got, want) / norm(W), budgets.edits];
  }
}

// ------------------------------------------------------------------ certified cases
//
// A number lies within `radius` of x + low: relative |x|; where x is 0, absolute if low is not 0, or else 0.
// Here x and low become whole numbers of 2^-BINARY, so that sums of products have no rounding at all.

const BINARY = 1100;
const SLACK = 1 + 1e-9; // more than a few sums of radii lose

const bits = new DataView(new ArrayBuffer(8));

const whole = (x) => {
  bits.setFloat64(0, x);
  const word = bits.getBigUint64(0);
  const exponent = Number((word >> 52n) & 0x7ffn);
  const fraction = (word & 0xfffffffffffffn) | (exponent ? 1n << 52n : 0n);
  const size = fraction << BigInt(BINARY - 1075 + Math.max(exponent, 1));
  return word >> 63n ? -size : size;
};

const next = (x, step) => { // the float64 beside |x|, towards 0 or away from it
  bits.setFloat64(0, Math.abs(x));
  bits.setBigUint64(0, bits.getBigUint64(0) + BigInt(step));
  return bits.getFloat64(0);
};

const ball = (file, path) => {
  const [x, low] = [get(file, path), get(file, `${path}_low`)];
  if (!x || !low) return null;
  const { relative, absolute, settled } = file.get(path).attrs;
  const radius = x.x.map((one, i) => (one !== 0 ? relative.value * Math.abs(one) : low.x[i] === 0 ? 0 : absolute.value));
  return { x: x.x, low: low.x, radius, shape: x.shape, settled: Number(settled.value) };
};

const wholeOf = (b) => (b.whole ??= Array.from(b.x, (one, i) => whole(one) + whole(b.low[i])));

const fill = (n, x) => {
  const made = (y) => new Float64Array(n).fill(y);
  return { x: made(x), low: made(0), radius: made(0) };
};

// (P, Q), the sum over rows of one[r][p] other[r][q]; rows where keep is 0 are left out. Whole numbers of 2^-2·BINARY, and radii.
const summed = (one, other, P, Q, keep) => {
  const rows = one.x.length / P;
  if (other.x.length !== rows * Q) throw Error("shapes differ");
  const [X, Y] = [one, other].map(wholeOf);
  const [sums, radius] = [Array(P * Q), new Float64Array(P * Q)];
  for (let p = 0; p < P; p++)
    for (let q = 0; q < Q; q++) {
      let sum = 0n;
      for (let r = 0; r < rows; r++) {
        if (keep && keep[r] === 0) continue;
        const [a, b] = [r * P + p, r * Q + q];
        const [e, f] = [one.radius[a], other.radius[b]];
        sum += X[a] * Y[b];
        radius[p * Q + q] += Math.abs(one.x[a]) * f + Math.abs(other.x[b]) * e + 2 * e * f;
      }
      sums[p * Q + q] = sum;
    }
  return { sums, radius };
};

// how many entries of claimed (P, Q) cannot be that sum
const proved = (claimed, one, other, P, Q, keep) => {
  const C = wholeOf(claimed);
  const { sums, radius } = summed(one, other, P, Q, keep);
  if (C.length !== P * Q) throw Error("shapes differ");
  const outside = (sum, i) => {
    const far = sum - (C[i] << BigInt(BINARY));
    return (far < 0n ? -far : far) > whole((radius[i] + claimed.radius[i]) * SLACK) << BigInt(BINARY);
  };
  return sums.filter(outside).length;
};

// the sum as a ball once more: what is below 2^-BINARY is cut off, which is less than 2^-1074
const product = (one, other, P, Q) => {
  const { sums, radius } = summed(one, other, P, Q);
  const cut = sums.map((sum) => sum >> BigInt(BINARY));
  const x = Float64Array.from(cut, (one) => Number(one >> 100n) * 2 ** -(BINARY - 100));
  return { x, low: new Float64Array(P * Q), whole: cut, radius: radius.map((e) => e * SLACK + 2 ** -1074) };
};

const entries = (b, at) => {
  const part = (x) => Float64Array.from(at, (i) => (i < 0 ? 0 : x[i]));
  const all = wholeOf(b);
  return { x: part(b.x), low: part(b.low), radius: part(b.radius), whole: at.map((i) => (i < 0 ? 0n : all[i])) };
};

const turned = (b, rows, columns) =>
  entries(b, Array.from(b.x, (_, i) => (i % rows) * columns + Math.floor(i / rows)));

const joined = (...every) => {
  const part = (name) => Float64Array.from(every.flatMap((b) => Array.from(b[name])));
  return { x: part("x"), low: part("low"), radius: part("radius") };
};

const opposite = (b) => ({ ...b, x: b.x.map((y) => -y), low: b.low.map((y) => -y), whole: undefined });

function* settledEntries(file, path) {
  const own = ball(file, path);
  if (!own) throw Error(`${path} is not certified in the file`);
  const { x, low, radius, settled } = own;
  let [count, odd] = [0, 0];
  const most = x.reduce((largest, one) => Math.max(largest, Math.abs(one)), 0);
  const wide = radius.filter((e) => !(e >= 0 && e <= (most > 0 ? most * 1e-30 : Number.MAX_VALUE))); // NaN is too wide
  yield [`radius that leaves fewer than thirty digits of ${path}`, wide.length, 0];
  for (let i = 0; i < x.length; i++) {
    const size = Math.abs(x[i]);
    if (size !== 0 && !(Math.abs(low[i]) <= next(size, 1) - size)) odd++;
    const gap = size === 0 ? 0 : size - next(size, -1);
    bits.setFloat64(0, size); // of a number known exactly that lies half-way, the last bit is 0
    const even = bits.getBigUint64(0) % 2n === 0n;
    const [far, half] = [Math.abs(low[i]), gap / 2];
    if ((far + radius[i]) * SLACK < half || (radius[i] === 0 && far === half && even)) count++;
  }
  yield [`low part of ${path}`, odd, 0];
  yield [`count of settled entries of ${path}`, Math.abs(count - settled), 0];
}

function* certifiedLayer(file, layer) {
  const keep = get(file, `rows/${layer}/kept`).x;
  const [a, g, drawn] = ["a", "g", "g_sampled"].map((x) => ball(file, `rows/${layer}/${x}`));
  const [I, O] = [a.shape.at(-1), g.shape.at(-1)];
  const ones = fill(keep.length, 1);
  for (const [name, one, other, P, Q, only] of [
    [`factors/${layer}/sum_A`, a, a, I, I, keep], [`factors/${layer}/sum_G`, drawn, drawn, O, O, keep],
    [`empirical/${layer}/sum_G`, g, g, O, O, keep], [`factors/${layer}/sum_a`, a, ones, I, 1, keep],
    [`gradients/${layer}/weight`, g, a, O, I, null], [`gradients/${layer}/bias`, g, ones, O, 1, null],
  ]) {
    const claimed = ball(file, name); // a tied head has no gradient of its own
    if (claimed) yield [`certified ${name}`, proved(claimed, one, other, P, Q, only), 0];
  }
}

// n Σ values = tr S, S U = n U diag(values), UᵀU = I. As n values would be rounded, they are n terms.
function* certifiedBasis(file, layer) {
  for (const [side, name] of [["A", "mu"], ["G", "lam"]]) {
    const S = ball(file, `factors/${layer}/sum_${side}`);
    const [U, v] = [ball(file, `basis/${layer}/U_${side}`), ball(file, `basis/${layer}/${name}`)];
    const n = get(file, `factors/${layer}/n_${side}`).x[0];
    const [d, r] = [v.x.length, U.shape[1]];
    const range = (count, of) => Array.from({ length: count }, (_, i) => of(i));
    const diagonal = entries(S, range(d, (i) => i * (d + 1)));
    const terms = joined(...range(n, () => v), opposite(diagonal));
    yield [`certified trace of ${side} of ${layer}`, proved(fill(1, 0), terms, fill(n * d + d, 1), 1, 1), 0];
    const eye = fill(r * r, 0);
    for (let k = 0; k < r; k++) eye.x[k * r + k] = 1;
    yield [`certified UᵀU of ${side} of ${layer}`, proved(eye, U, U, r, r), 0];
    for (let k = 0; k < r; k++) {
      const u = entries(U, range(d, (i) => i * r + k));
      const value = opposite(entries(v, [k]));
      const [one, other] = [joined(S, ...range(n, () => u)), joined(u, ...range(n, () => value))];
      yield [`certified S U of ${side} of ${layer}`, proved(fill(d, 0), one, other, d, 1), 0];
    }
  }
}

// each row keeps its first pairs, as many as the manifest says; and W' = U_G (C ∘ M) U_Aᵀ
function* certifiedEdits(file, layer, certificate) {
  const [U, V] = ["U_G", "U_A"].map((x) => ball(file, `basis/${layer}/${x}`));
  const at = "weights/parameters";
  const w = get(file, `${at}/${layer}/weight`) ?? get(file, `${at}/embed/weight`); // a tied head
  const [O, R] = U.shape;
  const [I, Q] = V.shape;
  for (const share of Object.keys(SHARES)) {
    const mask = get(file, `edits/${share}/${layer}/mask`)?.x;
    if (!mask) continue;
    const { kept } = certificate.arrays[`edits.${share}.${layer}.mask`.replaceAll("/", ".")];
    const odd = mask.filter((one, i) => (one === 1) !== i % I < kept[Math.floor(i / I)]).length;
    yield [`counts of the mask of ${layer}`, odd, 0];
    const W = { ...fill(O * I, 0), x: w.x };
    const C = product(turned(product(U, W, R, I), R, I), V, R, Q);
    const M = entries(C, Array.from(C.x, (_, i) => (mask[Math.floor(i / Q) * I + (i % Q)] ? i : -1)));
    const P = turned(product(turned(U, O, R), M, O, Q), O, Q);
    const claimed = ball(file, `edits/${share}/${layer}/weight`);
    yield [`certified edited weight of ${layer}`, proved(claimed, P, turned(V, I, Q), O, I), 0];
  }
}

// logits = W a + b at every position that the head reads; padding has zeros
function* certifiedLogits(file) {
  const [a, z] = [ball(file, "rows/head/a"), ball(file, "logits")];
  const at = "weights/parameters";
  const W = (get(file, `${at}/head/weight`) ?? get(file, `${at}/embed/weight`)).x;
  const b = get(file, `${at}/head/bias`)?.x ?? new Float64Array(z.shape.at(-1));
  const [D, V] = [a.shape.at(-1), z.shape.at(-1)];
  const w = fill((D + 1) * V, 0);
  for (let v = 0; v < V; v++) {
    for (let d = 0; d < D; d++) w.x[d * V + v] = W[v * D + d];
    w.x[D * V + v] = b[v];
  }
  for (let r = 0; r < a.x.length / D; r++) {
    const [read, own] = [fill(D + 1, 1), fill(V, 0)];
    for (const part of ["x", "low", "radius"]) {
      read[part].set(a[part].subarray(r * D, (r + 1) * D));
      own[part].set(z[part].subarray(r * V, (r + 1) * V));
    }
    if (read.x.subarray(0, D).some((x) => x !== 0)) yield ["certified logits", proved(own, read, w, 1, V), 0];
  }
}

function* certified(file, certificate) {
  for (const [name, { kept }] of Object.entries(certificate.arrays))
    if (!kept) yield* settledEntries(file, name.replaceAll(".", "/")); // a mask is no ball
  for (const layer of layersOf(file, "rows", "kept"))
    yield* [...certifiedLayer(file, layer), ...certifiedBasis(file, layer), ...certifiedEdits(file, layer, certificate)];
  const [nats, loss] = [ball(file, "nats"), ball(file, "loss")];
  yield ["certified loss", proved(loss, nats, fill(nats.x.length, 1), 1, 1), 0];
  if (certificate["logits are W a + b"]) yield* certifiedLogits(file);
}

// ------------------------------------------------------------------ cases

const judge = (path, manifest) => {
  const file = new File(path, "r");
  const out = [];
  for (const layer of layersOf(file, "rows", "kept")) out.push(...sums(file, layer, manifest.budgets));
  for (const layer of layersOf(file, "basis", "lam"))
    out.push(...basis(file, layer, manifest.budgets), ...edits(file, layer, manifest.budgets));
  if (manifest.certificate) out.push(...certified(file, manifest.certificate));
  file.close();
  return out;
};

const main = async (folder) => {
  await h5wasm.ready;
  const read = (name) => JSON.parse(readFileSync(`${folder}/${name}.json`, "utf8"));
  let [right, wrong, left] = [0, 0, 0];
  for (const { caseId } of read("index").cases) {
    const manifest = read(caseId);
    const path = `${folder}/${manifest.file.name}`;
    const sha256 = createHash("sha256").update(readFileSync(path)).digest("hex");
    if (sha256 !== manifest.file.sha256) {
      console.log(`${caseId}: its bytes do not match their SHA-256`);
      wrong++;
      continue;
    }
    if (manifest.needs.every((need) => need === "forward")) {
      left++;
      continue;
    }
    const found = judge(path, manifest);
    const bad = found.filter(([, error, budget]) => !(error <= budget)); // NaN is not
    if (found.length && bad.length > 0 === (manifest.result === "invalid")) right++;
    else {
      const why = bad.length ? `${bad[0][0]}: ${bad[0][1]} > ${bad[0][2]}` : "nothing shows it";
      console.log(`${caseId} is ${manifest.result}, but ${why}`);
      wrong++;
    }
  }
  console.log(`Node: ${right} cases as they should be, ${wrong} not; ${left} need a forward pass`);
  return wrong || !right ? 1 : 0;
};

if (process.argv.length !== 3) {
  console.error("usage: node check.mjs FOLDER");
  process.exit(2);
}
main(process.argv[2]).then(
  (status) => process.exit(status),
  (error) => {
    console.error(`check: ${error.message}`);
    process.exit(1);
  },
);
