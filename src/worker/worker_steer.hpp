/*
 * worker_steer.hpp
 *		What the steering functions and deal_sync_err_rec share.
 */
#pragma once

#include "worker_internal.hpp"

namespace mmrepl::worker
{

int RequireSlot(const catalog::StreamRow *row);
List *StreamsToSteer(const char *server_name);
void TakeOver(const catalog::StreamRow *row, int slot);

} // namespace mmrepl::worker
