// Fibres and their scheduler: threads of a block take turns on one processor, and switch only where they wait.
#include "block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "memory.h"
#include "program.h"

#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembly"
#endif

// Saves the registers that a call keeps and the stack of the running fibre, and goes on with another's.
extern "C" void embedding_kernels_switch(void** save, void* to);
asm(R"(
.text
.local embedding_kernels_switch
.type embedding_kernels_switch,@function
embedding_kernels_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size embedding_kernels_switch,.-embedding_kernels_switch
)");

namespace emulation {

Block* current_block = nullptr;
Thread* current_thread = nullptr;
bool failing = false;
uintptr_t stacks_begin = 0, stacks_end = 0;

namespace {

uint32_t* written_past = nullptr;  // for each word of the stacks: the begin_products that it was last written past

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMostThreads = 1024;
constexpr int kWarp = 32;

void* scheduler_stack = nullptr;
void (*kernel_entry)(const void*) = nullptr;
const void* kernel_arguments = nullptr;
bool failed = false;
std::string failure;

// One stack a thread, with a page below that may not be touched.
unsigned char* stacks() {
  static unsigned char* const memory = [] {
    void* mapped = mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < kMostThreads; ++i) {
      mprotect(static_cast<unsigned char*>(mapped) + kStackBytes * static_cast<size_t>(i), 4096, PROT_NONE);
    }
    void* const words = mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (words == MAP_FAILED) throw std::bad_alloc();
    written_past = static_cast<uint32_t*>(words);
    stacks_begin = reinterpret_cast<uintptr_t>(mapped);
    stacks_end = stacks_begin + kStackBytes * kMostThreads;
    return static_cast<unsigned char*>(mapped);
  }();
  return memory;
}

[[noreturn]] void leave() {
  embedding_kernels_switch(&current_thread->stack_pointer, scheduler_stack);
  std::abort();  // a finished thread is never resumed
}

void thread_main() {
  kernel_entry(kernel_arguments);
  const Thread& thread = *current_thread;
  if (thread.last_store > thread.clock.seen.waited[kStores]) {
    fail("a thread ends while its bulk stores may still read shared memory", {});
  }
  if (!thread.in_flight.empty()) fail("a thread ends before wait_products has seen its products through", {});
  current_thread->state = Thread::kFinished;
  leave();
}

std::string text_of(const Block& block) {
  const dim3 at = block.index;
  return "block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string range_text(const std::vector<int>& sorted) {
  std::string text;
  for (size_t i = 0; i < sorted.size();) {
    size_t j = i;
    while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(sorted[i]);
    if (j > i) text += "-" + std::to_string(sorted[j]);
    i = j + 1;
  }
  return text;
}

}  // namespace

Options& options() {
  static Options chosen;
  return chosen;
}

Thread& thread_of_stack(uintptr_t address) {
  return current_block->thread(static_cast<int>((address - stacks_begin) / kStackBytes));
}

void access_registers(const Thread& thread, uintptr_t address, size_t bytes, bool writes, uintptr_t site) {
  if (writes && thread.products_begun != 0) {
    const uintptr_t first = (address - stacks_begin) / 4, last = (address + bytes - 1 - stacks_begin) / 4;
    std::fill(written_past + first, written_past + last + 1, thread.products_begun);
  }
  for (const InFlight& held : thread.in_flight) {
    if (address >= held.end || address + bytes <= held.begin || !(held.sums || writes)) continue;
    fail(held.sums ? "sums are touched before wait_products has seen their product through"
                   : "a factor is overwritten before wait_products has seen its product through",
         {site});
  }
}

bool were_written(const Thread& thread, const uint32_t* registers, size_t count) {
  const uint32_t* const first = written_past + (reinterpret_cast<uintptr_t>(registers) - stacks_begin) / 4;
  return std::find(first, first + count, thread.products_begun) != first + count;
}

void fail(const std::string& what, std::initializer_list<uintptr_t> sites) {
  Thread& thread = *current_thread;
  failing = true;
  failed = true;
  failure = what + "\n  " + text_of(*current_block) + ", thread " + std::to_string(thread.index);
  for (uintptr_t site : sites) {
    if (site != 0) failure += "\n  " + describe_site(site);
  }
  leave();
}

Block::Block(dim3 index_, dim3 size_, dim3 grid_, uint32_t number_, unsigned char* shared_, size_t shared_size_)
    : index(index_),
      size(size_),
      grid(grid_),
      number(number_),
      shared(shared_),
      shared_size(shared_size_),
      threads_count(static_cast<int>(size_.x * size_.y * size_.z)),
      products(static_cast<size_t>((threads_count + kWarp - 1) / kWarp)),
      threads_(static_cast<size_t>(threads_count)),
      barriers_(16),
      meetings_(products.size()),
      meetings_of_warpgroups_(products.size() / 4),
      first_named_(static_cast<uint32_t>(threads_count) + static_cast<uint32_t>(products.size())),
      random_(options().seed * 0x9e3779b97f4a7c15u + number_) {
  const auto nothing = std::make_shared<const Times>();
  for (int i = 0; i < threads_count; ++i) {
    Thread& thread = threads_[static_cast<size_t>(i)];
    thread.index = i;
    thread.warp = i / kWarp;
    thread.lane = i % kWarp;
    const auto u = static_cast<unsigned>(i);
    thread.place = dim3(u % size.x, u / size.x % size.y, u / size.x / size.y);
    thread.state = Thread::kReady;
    thread.agents.thread = static_cast<uint32_t>(i);
    thread.agents.beside[kProducts] = static_cast<uint32_t>(threads_count + thread.warp);
    thread.clock.seen.met = thread.clock.published.met = nothing;
    thread.clock.seen.own = 1;
    auto* top = reinterpret_cast<void**>(stacks() + kStackBytes * static_cast<size_t>(i + 1));
    // as if it had been called: the return address below a multiple of 16, six saved registers under it
    top[-2] = reinterpret_cast<void*>(&thread_main);
    thread.stack_pointer = top - 2 - 6;
  }
}

size_t Block::draw() {
  random_ = random_ * 6364136223846793005u + 1442695040888963407u;
  return static_cast<size_t>(random_ >> 33);
}

Thread* Block::next() {
  // copies that land late do so when nothing else can happen
  while (ready_.empty() && phases.land_one(*this, options().order == Order::kRandom ? draw() : 0)) {
  }
  if (ready_.empty()) return nullptr;
  size_t place = 0;
  switch (options().order) {
    case Order::kForward:
      break;
    case Order::kReverse:
      place = ready_.size() - 1;
      break;
    case Order::kRandom:
      place = draw() % ready_.size();
      break;
    case Order::kWarpFirst:
      for (size_t i = 0; i < ready_.size(); ++i) {
        if (ready_[i] / kWarp == last_warp_) {
          place = i;
          break;
        }
      }
  }
  Thread& thread = threads_[static_cast<size_t>(ready_[place])];
  thread.waits_barrier = nullptr;
  ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(place));
  last_warp_ = thread.warp;
  return &thread;
}

void Block::make_ready(Thread& thread) {
  thread.state = Thread::kReady;
  ready_.push_back(thread.index);
}

void Block::run(void (*entry)(const void*), const void* arguments) {
  kernel_entry = entry;
  kernel_arguments = arguments;
  failed = failing = false;
  for (Thread& thread : threads_) ready_.push_back(thread.index);
  current_block = this;
  while (Thread* thread = next()) {
    current_thread = thread;
    embedding_kernels_switch(&scheduler_stack, thread->stack_pointer);
    current_thread = nullptr;
    if (failed) break;
  }
  if (!failed) report_end();
  current_block = nullptr;
  if (failed) throw std::runtime_error(failure);
}

void Block::wait(const char* what, uintptr_t site) {
  Thread& thread = *current_thread;
  thread.state = Thread::kWaiting;
  thread.waits_for = what;
  thread.waits_at = site;
  embedding_kernels_switch(&thread.stack_pointer, scheduler_stack);
}

void Block::report_end() {
  std::vector<int> finished;
  std::vector<std::pair<std::string, std::vector<int>>> waiting;
  for (const Thread& thread : threads_) {
    if (thread.state == Thread::kFinished) {
      finished.push_back(thread.index);
      continue;
    }
    const std::string what = thread.waits_barrier == nullptr ? thread.waits_for : thread.waits_barrier->describe();
    const std::string where = what + " at " + describe_site(thread.waits_at);
    auto found = waiting.begin();
    while (found != waiting.end() && found->first != where) ++found;
    if (found == waiting.end()) found = waiting.insert(found, {where, {}});
    found->second.push_back(thread.index);
  }
  const PhaseBarrier* const unawaited = phases.unawaited();
  failed = !waiting.empty() || unawaited != nullptr;
  if (waiting.empty()) {
    if (failed) failure = text_of(*this) + " ends, and nobody has waited for copies: " + unawaited->describe();
    return;
  }
  failure = "deadlock in " + text_of(*this);
  for (const auto& [where, who] : waiting) failure += "\n  threads " + range_text(who) + " wait for " + where;
  if (!finished.empty()) failure += "\n  threads " + range_text(finished) + " have ended";
}

void Block::barrier(uint32_t name, uint32_t count, bool waits, uintptr_t site) {
  Thread& thread = *current_thread;
  if (name >= barriers_.size()) fail("barrier " + std::to_string(name) + " does not exist: there are 16", {site});
  if (count == 0) count = static_cast<uint32_t>((threads_count + kWarp - 1) / kWarp * kWarp);
  if (count % kWarp != 0) fail("a barrier for " + std::to_string(count) + " threads, which are no whole warps", {site});
  Barrier& at = barriers_[name];
  if (at.arrived.empty()) {
    at.count = count;
  } else if (at.count != count) {
    fail("barrier " + std::to_string(name) + " is awaited for " + std::to_string(at.count) + " and for " +
             std::to_string(count) + " threads",
         {site});
  }
  at.arrived.push_back(thread.clock.arrive(thread.agents));
  if (waits) at.waiting.push_back(thread.index);
  // a block whose last warp is not full counts that warp as whole
  const auto missing = static_cast<size_t>(
      threads_count % kWarp == 0 || count < static_cast<uint32_t>(threads_count) ? 0 : kWarp - threads_count % kWarp);
  if (at.arrived.size() + missing < count) {
    if (waits) wait("a barrier", site);
    return;
  }
  const TimesMet seen = join(at.arrived, &Arrival::seen), published = join(at.arrived, &Arrival::published);
  const std::vector<int> waiting = std::move(at.waiting);
  at = Barrier();
  for (int index : waiting) {
    Thread& other = threads_[static_cast<size_t>(index)];
    other.clock.seen.met = seen;
    other.clock.published.met = published;
    if (&other != &thread) make_ready(other);
  }
}

void Block::meet(const Statement& statement, uint32_t mask, Frame& mine, Act act, uintptr_t site) {
  Thread& thread = *current_thread;
  const int first = thread.warp * kWarp;
  const int lanes = std::min(kWarp, threads_count - first);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;  // lanes that the block does not have
  const uint32_t bit = 1u << thread.lane;
  if ((mask & bit) == 0) fail("lane " + std::to_string(thread.lane) + " is not in the mask of its instruction", {site});
  std::vector<Meeting>& open = meetings_[static_cast<size_t>(thread.warp)];
  size_t place = 0;
  while (place < open.size() &&
         !(open[place].statement == &statement && open[place].mask == mask && (open[place].arrived & bit) == 0)) {
    ++place;
  }
  if (place == open.size()) open.push_back({&statement, mask, 0, {}});
  open[place].arrived |= bit;
  open[place].frames[thread.lane] = &mine;
  if (open[place].arrived != mask) {
    wait(statement.opcode.c_str(), site);
    return;
  }
  const Meeting met = open[place];
  open.erase(open.begin() + static_cast<std::ptrdiff_t>(place));
  Thread* threads[32] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) threads[lane] = &threads_[static_cast<size_t>(first + lane)];
  }
  act(*this, statement, met.frames, threads);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (threads[lane] != nullptr && threads[lane] != &thread) make_ready(*threads[lane]);
  }
}

void Block::meet_warpgroup(const Statement& statement, Frame& mine, ActOfWarpgroup act, uintptr_t site) {
  Thread& thread = *current_thread;
  const auto number = static_cast<size_t>(thread.index / kWarpgroup);
  if (number >= meetings_of_warpgroups_.size()) {
    fail("a product of a warpgroup that does not have 128 threads", {site});
  }
  MeetingOfWarpgroup& at = meetings_of_warpgroups_[number];
  if (at.arrived == 0) at.statement = &statement;
  if (at.statement != &statement) {
    fail("the threads of a warpgroup have come to different products: another is " + at.statement->opcode, {site});
  }
  at.frames[static_cast<size_t>(thread.index % kWarpgroup)] = &mine;
  if (++at.arrived < kWarpgroup) {
    wait(statement.opcode.c_str(), site);
    return;
  }
  at.arrived = 0;
  Thread* const threads = &threads_[number * kWarpgroup];
  act(*this, statement, at.frames.data(), threads, site);
  for (int i = 0; i < kWarpgroup; ++i) {
    if (&threads[i] != &thread) make_ready(threads[i]);
  }
}

void Block::order_lanes(Thread* const (&threads)[32]) {
  std::vector<Arrival> arrivals;
  for (Thread* thread : threads) {
    if (thread != nullptr) arrivals.push_back(thread->clock.arrive(thread->agents));
  }
  const TimesMet seen = join(arrivals, &Arrival::seen), published = join(arrivals, &Arrival::published);
  for (Thread* thread : threads) {
    if (thread == nullptr) continue;
    thread->clock.seen.met = seen;
    thread->clock.published.met = published;
  }
}

const TimesMet& Block::joined(const TimesMet& mine, const TimesMet& others) {
  if (mine == others || others->empty()) return mine;
  for (const Joined& known : joined_) {
    if (known.mine == mine && known.others == others) return known.both;
  }
  auto both = std::make_shared<Times>(*mine);
  join_into(*both, *others);
  Joined& place = joined_[last_joined_++ % joined_.size()];
  place = {mine, others, *both == *mine ? mine : TimesMet(both)};
  return place.both;
}

void Block::acquire(Thread& thread, const TimesMet& seen, const TimesMet& published) {
  thread.clock.seen.met = joined(thread.clock.seen.met, seen);
  thread.clock.published.met = joined(thread.clock.published.met, published);
}

uint32_t Block::new_agent(const std::string& name, bool ordinary) {
  names_.push_back(name);
  ordinary_.push_back(ordinary);
  return first_named_ + static_cast<uint32_t>(names_.size()) - 1;
}

uint32_t Block::agent_beside(Thread& thread, Beside what) {
  uint32_t& agent = thread.agents.beside[what];
  if (agent == kNobody) {
    agent = new_agent((what == kCopies ? "an asynchronous copy of thread " : "a bulk store of thread ") +
                          std::to_string(thread.index),
                      what == kCopies);
  }
  return agent;
}

std::string Block::name_of(uint32_t agent) const {
  const auto count = static_cast<uint32_t>(threads_count);
  if (agent < count) return "thread " + std::to_string(agent);
  if (are_products(agent)) return "a product of warpgroup " + std::to_string((agent - count) / 4);
  return names_[agent - first_named_];
}

}  // namespace emulation
