// A doubly linked list whose links are in its elements: append and erase in constant time without
// allocation.
#ifndef MMFREE_SERVER_SCHEDULER_ENTRY_LIST_H_
#define MMFREE_SERVER_SCHEDULER_ENTRY_LIST_H_

#include <cstddef>

namespace mmfree {

// Base of the elements. An element is in one list at a time.
struct EntryListNode {
  EntryListNode* previous = nullptr;
  EntryListNode* next = nullptr;
};

// Does not own its elements. T derives from EntryListNode. Not thread-safe.
template <typename T>
class EntryList {
 public:
  EntryList() = default;
  EntryList(const EntryList&) = delete;
  EntryList& operator=(const EntryList&) = delete;

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T* front() const { return static_cast<T*>(head_.next); }
  // The last element; the list is not empty.
  T* back() const { return static_cast<T*>(last_); }
  // The element after `element`; null after the last.
  static T* After(const T* element) { return static_cast<T*>(element->next); }

  void PushBack(T* element) {
    EntryListNode* const last = last_;
    last->next = element;
    element->previous = last;
    element->next = nullptr;
    last_ = element;
    ++size_;
  }

  void PushFront(T* element) {
    EntryListNode* const first = head_.next;
    if (first == nullptr) {
      PushBack(element);
      return;
    }
    head_.next = element;
    element->previous = &head_;
    element->next = first;
    first->previous = element;
    ++size_;
  }

  void Erase(T* element) {
    element->previous->next = element->next;
    if (element->next != nullptr) {
      element->next->previous = element->previous;
    } else {
      last_ = element->previous;
    }
    element->previous = nullptr;
    element->next = nullptr;
    --size_;
  }

 private:
  EntryListNode head_;  // before the first
  EntryListNode* last_ = &head_;
  size_t size_ = 0;
};

}  // namespace mmfree

#endif  // MMFREE_SERVER_SCHEDULER_ENTRY_LIST_H_
