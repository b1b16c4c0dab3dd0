#include "../../csrc/cpu/deformable_attention.cpp"
#include "fuzz.h"

// Anywhere: on edges, far outside, not finite.
template <class T>
static void place(Tensor<T>& locations) {
  const double places[] = {0, 1, 0.5, -0.25, 1e-30, 3, -1e4, 6e4, 1e38, -1e38, INFINITY, -INFINITY, NAN};
  for (T& x : locations.memory)
    x = from_acc<T>(acc_t<T>(draw(0, 3) ? double(draw(-100, 1100)) / 1000 : places[draw(0, 12)]));
}

// Locations and scores that are wide have elements of type U, not of the value's T.
template <class T, class U>
static void round_of(Dtype dtype, bool wide) {
  using C = acc_t<T>;
  DeformableAttention a;
  a.dtype = dtype;
  a.wide_locations = a.wide_scores = wide;
  a.softmax = draw(0, 2);
  a.B = draw(0, 3);
  a.H = draw(0, 4);
  a.Q = draw(0, draw(0, 3) ? 20 : 200);
  a.d = draw(1, draw(0, 2) ? 40 : 300);
  a.L = draw(1, 5);
  std::vector<int64_t> shapes, points;
  for (int64_t l = 0; l < a.L; ++l) {
    shapes.push_back(draw(1, 9));
    shapes.push_back(draw(1, 9));
    points.push_back(draw(0, 9));
    a.S += shapes[2 * l] * shapes[2 * l + 1];
    a.K += points[l];
  }
  a.shapes = shapes.data();
  a.points = points.data();
  Tensor<T> value({a.B, a.S, a.H, a.d}, true, draw(0, 1)), grad_value({a.B, a.S, a.H, a.d}, false, true);
  if (value.stride[3] != 1 && a.d > 1)
    value = Tensor<T>({a.B, a.S, a.H, a.d}, true, true);
  Tensor<U> locations({a.B, a.Q, a.H, a.K, 2}, true, true), scores({a.B, a.Q, a.H, a.K}, true, true);
  Tensor<U> grad_locations({a.B, a.Q, a.H, a.K, 2}, false, true), grad_scores({a.B, a.Q, a.H, a.K}, false, true);
  Tensor<T> result({a.B, a.Q, a.H, a.d}, false, true), grad_result({a.B, a.Q, a.H, a.d}, true, true);
  Tensor<C> softmax_rows({a.B, a.Q, a.H, 2}, false, true);
  auto mask = random_mask(a.B * a.S);
  auto rows = [](auto& t) { return QueryRows{t.data(), t.stride[0], t.stride[1], t.stride[2]}; };
  auto map = [](auto& t) { return HeadRows{t.data(), t.stride[0], t.stride[2], t.stride[1], 1}; };
  place(locations);
  a.value = map(value);
  a.locations = rows(locations);
  a.scores = rows(scores);
  if (draw(0, 1))
    a.mask = {reinterpret_cast<bool*>(mask.data()), a.S, 0, 1};
  a.result = rows(result);
  if (a.softmax)
    a.softmax_rows = softmax_rows.data();
  baseline::deformable_attention_forward(a, three);
  result.check("result");
  DeformableAttentionBackward g;
  g.forward = a;
  g.nontemporal = draw(0, 1);
  g.grad_result = rows(grad_result);
  if (draw(0, 3))
    g.grad_value = map(grad_value);
  if (draw(0, 3))
    g.grad_locations = rows(grad_locations);
  if (draw(0, 3))
    g.grad_scores = rows(grad_scores);
  baseline::deformable_attention_backward(g, three);
  if (g.grad_value.data)
    grad_value.check("grad_value");
  if (g.grad_locations.data)
    grad_locations.check("grad_locations");
  if (g.grad_scores.data)
    grad_scores.check("grad_scores");
}

template <class T>
static void round(Dtype dtype) {
  draw(0, 2) ? round_of<T, T>(dtype, false) : round_of<T, acc_t<T>>(dtype, true);
}

FUZZ_MAIN
