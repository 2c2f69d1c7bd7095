// The tiles that a block of rows walks over: documents and then the rest, or all keys.
#pragma once

#include "blocks.h"

namespace dream::cuda {

DREAM_DEVICE int tiles_of(const Parameters& p, int keys) {
  return (keys + p.tile_keys - 1) / p.tile_keys;
}

// Keys of an ascending list that may be at or before `limit`.
DREAM_DEVICE int seen_of(int keys, int limit) { return keys <= limit ? keys : limit + 1; }

struct Walk {
  const Tile* documents;
  int document_tiles;
  int keys;       // in the list that follows them
  int list;       // where that list begins
  int segment;    // which the list is
  int begin, end;

  // The tiles of a scored row, or of a plain one: all keys, without documents. `limit` is the last
  // position that any of the block's rows sees.
  static DREAM_DEVICE Walk of(const Parameters& p, int64_t b, const Counts& counts, bool scored,
                              int limit) {
    Walk walk;
    walk.documents = p.tiles + b * p.tile_limit;
    walk.document_tiles = scored ? counts.document_tiles : 0;
    walk.list = scored ? p.length : 2 * p.length;
    walk.keys = seen_of(counts.rest_keys + (scored ? 0 : counts.document_keys), limit);
    walk.segment = p.documents;
    walk.begin = 0;
    walk.end = walk.document_tiles + tiles_of(p, walk.keys);
    return walk;
  }

  DREAM_DEVICE void take_split(int split, int splits) {
    const int64_t tiles = end;
    begin = static_cast<int>(tiles * split / splits);
    end = static_cast<int>(tiles * (split + 1) / splits);
  }

  // The same where no document is cut, nor the rest if it is `whole`.
  DREAM_DEVICE void take_documents(const Parameters& p, int split, int splits, bool whole) {
    const int all = end;
    take_split(split, splits);
    begin = next_border(p, begin, all, whole);
    end = next_border(p, end, all, whole);
  }

  // The first tile from i on where a split may begin.
  DREAM_DEVICE int next_border(const Parameters& p, int i, int all, bool whole) const {
    while (i < document_tiles && !(tile(p, i).ends & kOpens)) ++i;
    return whole && i > document_tiles ? all : i;
  }

  DREAM_DEVICE Tile tile(const Parameters& p, int i) const {
    if (i < document_tiles) return load(documents + i);
    const int first = (i - document_tiles) * p.tile_keys, left = keys - first;
    return Tile{list + first, left < p.tile_keys ? left : p.tile_keys, segment,
                i == document_tiles ? kOpens : 0};  // what comes last never closes
  }
};

// Two stages of tiles of keys and values in shared memory, and the keys' positions.
template <int D, int THREADS>
struct Stages {
  static constexpr int kKeys = kTileKeys<D>;
  static constexpr int kTileBytes = kKeys * kRowBytes<D>;
  static constexpr int kBytes = 2 * (2 * kTileBytes + kKeys * 4);

  char* memory;

  DREAM_DEVICE Shared keys(int stage) const {
    return shared_address(memory) + stage * 2 * kTileBytes;
  }
  DREAM_DEVICE Shared values(int stage) const { return keys(stage) + kTileBytes; }
  DREAM_DEVICE int32_t* positions(int stage) const {
    return reinterpret_cast<int32_t*>(memory + 4 * kTileBytes) + stage * kKeys;
  }

  template <bool with_values>
  DREAM_DEVICE void copy(const Parameters& p, int64_t b, int key_head, const Tile& tile, int stage) {
    const int32_t* list = p.keys + b * 3 * static_cast<int64_t>(p.length) + tile.first;
    int32_t* const own = positions(stage);
    copy_keys<D, kKeys, THREADS, with_values>(
        p, b, key_head, list, tile.count, keys(stage), values(stage),
        [=](int row, int position) { own[row] = position; });
    commit_copies();
  }
};

// Calls visit(tile, stage, last) for each tile of a walk while the next one is copied.
template <bool with_values, int D, int THREADS, typename Visit>
DREAM_DEVICE void walk_over(const Parameters& p, int64_t b, int key_head, const Walk& walk,
                            Stages<D, THREADS> stages, Visit visit) {
  if (walk.begin >= walk.end) return;
  Tile next = walk.tile(p, walk.begin);
  sync_threads();  // the stages' last tiles, those of a walk before, were read
  stages.template copy<with_values>(p, b, key_head, next, walk.begin & 1);
  DREAM_ONCE for (int i = walk.begin; i < walk.end; ++i) {
    const Tile tile = next;
    wait_copies<0>();
    sync_threads();  // this tile is here for all, and the one before was read by all
    if (i + 1 < walk.end) {
      next = walk.tile(p, i + 1);
      stages.template copy<with_values>(p, b, key_head, next, (i + 1) & 1);
    }
    visit(tile, i & 1, i + 1 == walk.end);
  }
}

// log2(2^a + 2^b)
DREAM_DEVICE float add_logs(float a, float b) {
  const float peak = larger(a, b);
  return peak == -kInf ? peak : peak + log2(exp2(a - peak) + exp2(b - peak));
}

}  // namespace dream::cuda
