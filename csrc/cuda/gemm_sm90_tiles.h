// The tiles of nm_gemm_sm90.cu, why they are what they are, and a first choice among them. Pure
// functions of shapes, so they can be tested without a GPU.
//
// Why W goes to registers. Shared memory delivers 128 bytes per clock. m64nNk32 takes N/2 clocks
// and reads 64 N bytes of x, so x alone keeps shared memory busy all the time that the tensor cores
// work, whatever N is; each further byte is lost time. W through shared memory would be written
// once and read once: 2 * 64 bytes per row of W and step of 64, and a product of n256 would take
// 144 clocks for 128 of mathematics. The packed order is the register order, so W needs no shared
// memory: a lane loads 2 x 16 bytes of values and 4 of metadata per 64 rows and step.
//
// Which tile. Per step of 64 columns, in clocks of shared memory (L1 is the same memory, and what W
// passes through it once or twice is counted so), and bytes from L2, x shared by a cluster of two:
//
//      kOut x kRows   products   x in      W         sum       share of peak   L2 KB, per product
//       128 x 256        512      256    72-144    840-912        56-61 %      9 + 16   1.00
//       256 x 128        512      128   144-288    784-928        55-65 %     18 + 8    1.04
//       256 x 160        640      160   144-288    944-1088       59-68 %     18 + 10   0.90
//       128 x 128        256      128    72-144    456-528        48-56 %      9 + 8    1.36
//
// 256 x 160 is what registers hold: 160 sums and three steps of W, 54, of 240.
//
// x is read once per 64 rows of W whoever does it: warpgroups that split kRows instead of kOut
// would read the same bytes of x, and each would load all of W, doubling its share. So they split
// kOut. The filling of x costs less the taller the tile: 64 / kOut of the products' time.
//
// Without a cluster a large product asks L2 for 34 to 41 KB per 800 clocks and SM, more than it has
// been seen to give; the CTAs of a cluster take neighbouring rows of W and the same rows of x, and
// each copies its share of every x tile to all.
#pragma once

#include <algorithm>

#include "../common/nm_fragments.h"

namespace sparse_cocktail {
namespace sm90 {

constexpr int kWarpsOfGroup = 4, kWarpgroup = kWarpsOfGroup * kLanesOfWarp;
constexpr int kStepColumns = kFragmentColumns;  // 64: the 128 bytes that the swizzle spans
constexpr int kStepBytes = 2 * kStepColumns;    // of one row of x
constexpr int kSwizzlePeriod = 1024;            // 8 rows of 128 bytes

// kBlocks: 64-row blocks of W per consumer warpgroup. kStages: x tiles in flight. kDepth: steps of
// W in registers, the present one included; a load is issued kDepth - 1 steps before its use, which
// has to cover the latency of L2. kResident: CTAs per multiprocessor (SM).
template <int kConsumers_, int kBlocks_, int kRows_, int kCluster_, int kStages_, int kDepth_,
          int kResident_>
struct Tile {
  static constexpr int kConsumers = kConsumers_, kBlocks = kBlocks_, kRows = kRows_;
  static constexpr int kCluster = kCluster_, kStages = kStages_, kDepth = kDepth_;
  static constexpr int kResident = kResident_;
  static constexpr int kOut = kConsumers * kBlocks * kRowPadding;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kSums = kRows / 2;  // per thread and block: 64 * kRows / 128
  static constexpr int kStageBytes = kRows * kStepBytes;
  static constexpr int kBoxRows = kRows / kCluster;  // what one CTA of the cluster copies
  static constexpr int kOutputBytes = kOut * kRows * 2;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kOutputBytes + 2 * kStages * static_cast<int>(sizeof(uint64_t));
  // 64 K registers: 24 for each producer thread leave 240 for those of two consumer warpgroups.
  static constexpr bool kMovesRegisters = kConsumers == 2 && kBlocks * kSums > 64;
  static_assert(kRows <= 256, "N of wgmma, and rows of a TMA box");
  static_assert(kBoxRows * kStepBytes % kSwizzlePeriod == 0, "a box starts a swizzle pattern");
  static_assert(kSharedBytes * kResident <= 227 * 1024, "shared memory of a multiprocessor");
};

// The tiles by number; `tile` of the op picks one, 0 lets choose_tile() decide.
//              consumers blocks rows cluster stages depth resident     out x rows
using Tile1 = Tile<  2,      1,  256,    2,     4,     4,     1>;  // 128 x 256, pairs
using Tile2 = Tile<  2,      2,  128,    2,     8,     3,     1>;  // 256 x 128, pairs
using Tile3 = Tile<  2,      2,  160,    2,     6,     3,     1>;  // 256 x 160, pairs
using Tile4 = Tile<  2,      2,  160,    4,     6,     3,     1>;  // 256 x 160, fours
using Tile5 = Tile<  2,      2,  128,    1,     8,     3,     1>;  // 256 x 128
using Tile6 = Tile<  2,      1,  128,    2,     8,     4,     1>;  // 128 x 128, pairs
using Tile7 = Tile<  2,      1,   64,    2,     8,     6,     1>;  // 128 x 64, pairs
using Tile8 = Tile<  1,      1,   64,    1,     8,     6,     2>;  // 64 x 64, two CTAs share an SM
constexpr int kTiles = 8;

struct TileSize {
  int out, rows, cluster, resident;
};
template <class T>
constexpr TileSize size_of() {
  return {T::kOut, T::kRows, T::kCluster, T::kResident};
}
inline constexpr TileSize kTileSizes[kTiles] = {
    size_of<Tile1>(), size_of<Tile2>(), size_of<Tile3>(), size_of<Tile4>(),
    size_of<Tile5>(), size_of<Tile6>(), size_of<Tile7>(), size_of<Tile8>()};

// ---- choice -------------------------------------------------------------------------------------

// What choose_tile() assumes of an SM; see the table at the top. A measured table per card, where
// there is one, is asked before this.
constexpr double kL2BytesPerClock = 30;  // its share, about 7 TB/s of 132 SMs at 1.75 GHz
constexpr double kWeightPasses = 0.85;   // clocks of L1 per row of W and step: 0.56 to 1.13
constexpr double kTileClocks = 2000;     // first copies, epilogue

// Estimated clocks of a product with one size of tile.
inline double clocks_of(const TileSize& t, int64_t out, int64_t rows, int64_t in,
                        int multiprocessors) {
  const auto pieces = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  const int64_t clusters = pieces(out, int64_t{t.out} * t.cluster) * pieces(rows, t.rows);
  // Clusters at full speed. Fours do not fit all groups of SMs: one less, see resident_clusters().
  const int64_t slots = std::max(multiprocessors / t.cluster - (t.cluster > 2), 1);
  const int64_t together = std::min<int64_t>(pieces(clusters, slots), t.resident);
  const int64_t waves = pieces(clusters, slots * together);
  const double shared = t.out / 64.0 * t.rows + t.rows + kWeightPasses * t.out;
  const double bytes = 72.0 * t.out + 128.0 * t.rows / t.cluster;
  const double step = std::max(shared, bytes / kL2BytesPerClock) * together;
  return waves * (pieces(in, kStepColumns) * step + kTileClocks);
}

// The number of the tile, from 1, with the lowest estimate.
inline int choose_tile(int64_t out, int64_t rows, int64_t in, int multiprocessors) {
  int best = 0;
  for (int i = 1; i < kTiles; ++i) {
    if (clocks_of(kTileSizes[i], out, rows, in, multiprocessors) <
        clocks_of(kTileSizes[best], out, rows, in, multiprocessors)) {
      best = i;
    }
  }
  return best + 1;
}

}  // namespace sm90
}  // namespace sparse_cocktail
