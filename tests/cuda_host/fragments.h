// Where the elements of a matrix product lie in the registers of a warp, as the PTX ISA draws them ("Matrix fragments
// for mma", "ldmatrix"). A test compares these maps with CuTe's layouts.
#pragma once

namespace emulation {

struct Element {
  int row, column;
};

// Of one lane: `g` is its group of four, `t` its place in it.
struct Lane {
  int g, t;
  explicit Lane(int lane) : g(lane / 4), t(lane % 4) {}
};

// C and D [16 × 8], 32-bit values: register i of 4.
inline Element accumulator(Lane lane, int i) { return {lane.g + 8 * (i / 2), 2 * lane.t + i % 2}; }

// A [16 × K] of m16n8: register i of 4 holds `values` neighbours of a row; value j.
inline Element left(Lane lane, int i, int j, int values) {
  return {lane.g + 8 * (i % 2), values * lane.t + j + 4 * values * (i / 2)};
}

// B [K × 8]: register i of 2 holds `values` neighbours of a column; value j.
inline Element right(Lane lane, int i, int j, int values) { return {values * lane.t + j + 4 * values * i, lane.g}; }

// ldmatrix: half j of a lane's register, in its matrix [8 × 8]; the same for each of the matrices.
inline Element loaded(Lane lane, int j, bool transposed) {
  return transposed ? Element{2 * lane.t + j, lane.g} : Element{lane.g, 2 * lane.t + j};
}

}  // namespace emulation
