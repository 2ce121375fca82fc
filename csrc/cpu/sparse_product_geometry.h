// Where the lanes of a sparse product lie: a convolution without im2col.
//
// All outputs of a channel are laid out as one flat row of lanes, images after each other, with
// gaps such that for each tap the inputs of neighbouring lanes are neighbours too. With a 3x3
// kernel, padding 1 and width 5, lanes are
//
//     0 x x x x x         x: input; 0: padding, shared by the end of a row and the next one's start
//     0 x x x x x         output (y, x) is lane 6 y + x, and tap (i, j) of it reads place 6 i + j
//     0 x x x ...         further on
//
// Lanes at the gaps are computed and dropped. A stride splits inputs into phases, which are such
// rows each: tap t of output o reads input o * stride + t * dilation - padding, which is element
// o + floor((t * dilation - padding) / stride) of one phase.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sparse_product.h"

namespace sparse_cocktail {

// One spatial axis.
struct Axis {
  int64_t kernel, stride, padding, dilation, in, out;
  int64_t first = 0, last = 0;  // elements that taps read, relative to the output's
  int64_t pitch = 0;            // from one row, or image, of lanes to the next
  std::vector<int64_t> phases;  // that taps read

  Axis(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t in, int64_t out)
      : kernel(kernel), stride(stride), padding(padding), dilation(dilation), in(in), out(out) {
    first = element(0), last = element(kernel - 1);
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const int64_t r = phase(tap);
      if (std::find(phases.begin(), phases.end(), r) == phases.end()) phases.push_back(r);
    }
    const int64_t length = out + last - first;
    int64_t shared = length;  // zeros at the end of each row that may be the next one's first
    for (int64_t r : phases) {
      const int64_t before = begin(r), after = length - end(r);
      shared = std::max<int64_t>(0, std::min({shared, before, after}));
    }
    pitch = std::max<int64_t>(1, length - shared);
  }
  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
  int64_t element(int64_t tap) const { return floor_div(tap * dilation - padding, stride); }
  int64_t phase(int64_t tap) const { return tap * dilation - padding - element(tap) * stride; }
  int64_t phase_index(int64_t tap) const {
    return std::find(phases.begin(), phases.end(), phase(tap)) - phases.begin();
  }
  // Place p of a row is input (p + first) * stride + r, where that exists: p in [begin, end).
  int64_t input(int64_t place, int64_t r) const { return (place + first) * stride + r; }
  int64_t begin(int64_t r) const { return std::max<int64_t>(0, -floor_div(r, stride) - first); }
  int64_t end(int64_t r) const {
    const int64_t count = floor_div(in - 1 - r, stride) + 1;  // elements of the phase
    return std::min(out + last - first, std::max(begin(r), count - first));
  }
};

struct Strides {
  int64_t image, channel, row, column;
};

inline Strides strides_of(bool channels_last, int64_t channels, int64_t height, int64_t width) {
  const int64_t plane = height * width;
  if (channels_last) return {plane * channels, 1, width * channels, channels};
  return {plane * channels, plane, width, 1};
}

class Geometry {
 public:
  Geometry(int64_t batch, const Axis& y, const Axis& x, const Strides& in, const Strides& out)
      : batch_(batch), y_(y), x_(x), in_(in), out_(out) {}

  int64_t phases() const { return static_cast<int64_t>(y_.phases.size() * x_.phases.size()); }
  int64_t image_lanes() const { return y_.pitch * x_.pitch; }
  int64_t lanes() const {
    return (batch_ - 1) * image_lanes() + (y_.out - 1) * x_.pitch + x_.out;
  }
  // How much further than its own lane a tap reads, at most.
  int64_t halo() const { return (y_.last - y_.first) * x_.pitch + x_.last - x_.first; }
  // Where the taps' inputs lie in a channel's part of a panel, `window` lanes per phase.
  std::vector<int64_t> tap_offsets(int64_t window) const {
    std::vector<int64_t> offsets;
    const auto columns = static_cast<int64_t>(x_.phases.size());
    for (int64_t i = 0; i < y_.kernel; ++i) {
      const int64_t row = y_.phase_index(i) * columns * window +
                          (y_.element(i) - y_.first) * x_.pitch;
      for (int64_t j = 0; j < x_.kernel; ++j) {
        offsets.push_back(row + x_.phase_index(j) * window + x_.element(j) - x_.first);
      }
    }
    return offsets;
  }
  int64_t in_lane_stride() const { return in_.column * x_.stride; }
  const Strides& in() const { return in_; }
  const Strides& out() const { return out_; }

  // The segments that fill `window` lanes from `first` on, one list after the other per phase.
  std::vector<Segment> inputs(int64_t first, int64_t window) const {
    std::vector<Segment> found;
    int64_t base = 0;
    for (int64_t ry : y_.phases) {
      for (int64_t rx : x_.phases) {
        const size_t start = found.size();
        const auto source = [&](int64_t n, int64_t y, int64_t x) {
          return n * in_.image + y_.input(y, ry) * in_.row + x_.input(x, rx) * in_.column;
        };
        walk(first, window, {y_.begin(ry), y_.end(ry)}, {x_.begin(rx), x_.end(rx)},
             in_lane_stride(), source, base, found);
        // The gaps are zero. One before the first input is a segment of its own.
        int64_t lane = base;
        if (found.size() == start || found[start].lane > lane) {
          found.insert(found.begin() + start, {static_cast<int32_t>(lane), 0, 0, 0});
        }
        for (size_t i = start; i < found.size(); ++i) {
          lane = i + 1 < found.size() ? found[i + 1].lane : base + window;
          found[i].length = static_cast<int32_t>(lane - found[i].lane);
        }
        base += window;
      }
    }
    return found;
  }

  // The segments that take the outputs among `count` lanes from `first` on.
  std::vector<Segment> outputs(int64_t first, int64_t count) const {
    std::vector<Segment> found;
    const auto target = [&](int64_t n, int64_t y, int64_t x) {
      return n * out_.image + y * out_.row + x * out_.column;
    };
    walk(first, count, {0, y_.out}, {0, x_.out}, out_.column, target, 0, found);
    return found;
  }

 private:
  struct Range {
    int64_t begin, end;
  };

  // Appends the lanes of [first, first + count) that lie in the ranges of rows and columns.
  // Neighbours that continue each other at lane_stride are one segment.
  template <class Offset>
  void walk(int64_t first, int64_t count, Range rows, Range columns, int64_t lane_stride,
            const Offset& offset, int64_t base, std::vector<Segment>& found) const {
    const size_t start = found.size();
    const int64_t last = first + count;
    // A row may begin before `first`, and reach into the lanes of the next row or image.
    int64_t n = std::max<int64_t>(0, (first - rows.end * x_.pitch - columns.end) / image_lanes());
    for (; n < batch_ && n * image_lanes() < last; ++n) {
      const int64_t image = n * image_lanes();
      int64_t y = std::max(rows.begin, (first - image - columns.end) / x_.pitch);
      for (; y < rows.end; ++y) {
        const int64_t row = image + y * x_.pitch;
        const int64_t begin = std::max(first, row + columns.begin);
        const int64_t end = std::min(last, row + columns.end);
        if (row + columns.begin >= last) break;
        if (begin >= end) continue;
        const int64_t place = offset(n, y, begin - row);
        if (found.size() > start) {
          Segment& previous = found.back();
          if (previous.lane + previous.count == base + begin - first &&
              previous.offset + previous.count * lane_stride == place) {
            previous.count += static_cast<int32_t>(end - begin);
            continue;
          }
        }
        found.push_back({static_cast<int32_t>(base + begin - first),
                         static_cast<int32_t>(end - begin), 0, place});
      }
    }
  }

  int64_t batch_;
  Axis y_, x_;
  Strides in_, out_;
};

}  // namespace sparse_cocktail
